"""Where the rows of packed sequences lie: host-side index arithmetic shared by the operators."""

import bisect
import functools
from collections.abc import Callable, Sequence

import torch

_plans: list = []


def cached_plan(maxsize: int) -> Callable[[Callable], Callable]:
    """`functools.lru_cache` for index arithmetic whose results hold tensors, which `forget_plans` can drop. They are ordinary tensors
    in inference mode too: an engine in the same process may be the first to need what a backward then keeps."""

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
    """Drops every cached plan: those made of tensors without data (FakeTensorMode) must not meet real ones."""
    for plan in _plans:
        plan.cache_clear()


class PlannedTensor:
    """A tensor of indices that a plan has made on the host. Its copy on a device is made once, not at every layer's call."""

    def __init__(self, tensor: torch.Tensor):
        self._copies = {tensor.device: tensor}
        self._tensor = tensor

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self._tensor.to(device)
        return self._copies[device]


def sequence_of_token(cu_seqlens: Sequence[int], token: int) -> int:
    """Index of the packed sequence that holds row `token`."""
    return bisect.bisect_right(cu_seqlens, token) - 1


def check_packing(cu_seqlens: Sequence[int], num_rows: int, state_positions: Sequence[int]) -> None:
    """Raises ValueError unless `cu_seqlens` covers exactly `num_rows` rows with non-empty sequences
    and every state position lies in (0, num_rows]."""
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != num_rows:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the number of rows ({num_rows}), got {list(cu_seqlens)[:8]}"
            f"{'...' if len(cu_seqlens) > 8 else ''} ending at {cu_seqlens[-1] if len(cu_seqlens) else 'nothing'}"
        )
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        if end <= start:
            raise ValueError(f"cu_seqlens must increase strictly (no empty sequences), got {start} before {end}")
    for position in _extremes(state_positions):
        if not 0 < position <= num_rows:
            raise ValueError(f"state positions must lie in 1..{num_rows}, got {position}")


def _extremes(positions: Sequence[int]) -> Sequence[int]:
    """What lies outside if any position does; a range of many is not walked through."""
    return positions[:: max(len(positions) - 1, 1)] if isinstance(positions, range) else positions
