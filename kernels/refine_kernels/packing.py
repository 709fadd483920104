"""Index arithmetic on the host that the operators share: finds tokens in packed sequences, and caches plans."""

import bisect
import functools
from collections.abc import Callable, Sequence

import torch

_plans: list = []


def cached_plan(maxsize: int) -> Callable[[Callable], Callable]:
    """`functools.lru_cache` for index arithmetic whose results hold tensors; `forget_plans` empties it.

    The tensors are ordinary ones even if the first call comes in inference mode: a rollout engine in the same process may be the
    first to compute a plan that a later backward saves.
    """

    def decorate(function: Callable) -> Callable:
        @functools.lru_cache(maxsize=maxsize)
        @functools.wraps(function)
        def plan(*args):
            with torch.inference_mode(False):
                return function(*args)

        _plans.append(plan)
        return plan

    return decorate


def forget_plans() -> None:
    """Drops every cached plan, so that plans made of tensors without data (FakeTensorMode) are not used with real ones."""
    for plan in _plans:
        plan.cache_clear()


class PlannedTensor:
    """A tensor of indices that a plan has computed on the host, copied to a device once instead of in every layer."""

    def __init__(self, tensor: torch.Tensor):
        self._copies = {tensor.device: tensor}
        self._tensor = tensor

    def on(self, device: torch.device) -> torch.Tensor:
        """The copy on `device`."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = on_device(self._tensor, device)
        return self._copies[device]


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor to a device. A GPU takes it from pinned memory of the host, so that nothing waits for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies tensors to the host, and waits for a GPU once. A GPU writes them into pinned memory: any other it could only fill piece by
    piece, each of which would be waited for."""
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x for x in tensors]
    device = next((x.device for x in tensors if x.is_cuda), None)
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return tuple(copies)


def sequence_of_token(cu_seqlens: Sequence[int], token: int) -> int:
    """Index of the packed sequence that holds the token with index `token`."""
    return bisect.bisect_right(cu_seqlens, token) - 1


def check_packing(cu_seqlens: Sequence[int], num_tokens: int, state_positions: Sequence[int]) -> None:
    """Raises ValueError unless `cu_seqlens` divides exactly `num_tokens` tokens into non-empty sequences
    and every state position lies in 1..num_tokens."""
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the number of tokens ({num_tokens}), got {list(cu_seqlens)[:8]}"
            f"{'...' if len(cu_seqlens) > 8 else ''} ending at {cu_seqlens[-1] if len(cu_seqlens) else 'nothing'}"
        )
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        if end <= start:
            raise ValueError(f"cu_seqlens must increase strictly (no empty sequences), got {start} before {end}")
    for position in _extremes(state_positions):
        if not 0 < position <= num_tokens:
            raise ValueError(f"state positions must lie in 1..{num_tokens}, got {position}")


def _extremes(positions: Sequence[int]) -> Sequence[int]:
    """The positions to check: the first and the last of a range, which may be long; otherwise all."""
    return positions[:: max(len(positions) - 1, 1)] if isinstance(positions, range) else positions
