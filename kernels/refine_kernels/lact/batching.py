"""Puts weights and tokens of several sequences into one tensor and takes them apart, with few operators and copies.

Legend: g sequences that advance together, H heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from refine_kernels.lact.state import FastWeights
from refine_kernels.packing import PlannedTensor, cached_plan


def padded(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks g pieces `[tokens, H, ...]` as `[g, H, most tokens, ...]`, with zeros after shorter ones."""
    longest = max(x.shape[0] for x in pieces)
    equally_long = [x if x.shape[0] == longest else F.pad(x, (*[0, 0] * (x.dim() - 1), 0, longest - x.shape[0])) for x in pieces]
    return stack(equally_long).transpose(1, 2)


def together(weights: Sequence[FastWeights]) -> tuple[torch.Tensor, ...]:
    """The weights of g sequences as one tensor `[3, g, H, ...]`, so that each step of an update is one operator. If w1 has another
    shape than w0 and w2: as three tensors `[1, g, H, ...]`."""
    if any(w.shape != weights[0].w0.shape for w in weights[0]):
        return tuple(stack(same)[None] for same in zip(*weights))
    return (stack([w for same in zip(*weights) for w in same]).unflatten(0, (3, len(weights))),)


def apart(joined: tuple[torch.Tensor, ...]) -> list[FastWeights]:
    """The inverse of `together`: the weights of each sequence."""
    num_sequences = joined[0].shape[1]
    views = [view for part in joined for view in part.flatten(0, 1).unbind()]
    return [FastWeights(*views[i::num_sequences]) for i in range(num_sequences)]


def take(weights: FastWeights, chosen: list[int]) -> FastWeights:
    """Selects weights along the first dim."""
    if chosen == list(range(weights.w0.shape[0])):
        return weights
    index = _index(tuple(chosen)).on(weights.w0.device)
    return weights.map(lambda w: w.index_select(0, index))


@cached_plan(maxsize=16)
def _index(chosen: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(torch.tensor(chosen))


def stack_weights(weights: Sequence[FastWeights]) -> FastWeights:
    """Stacks the weights of g sequences, `[g, H, ...]` each."""
    return FastWeights(*(stack(same) for same in zip(*weights)))


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, without a copy of a single tensor, or of tensors that are all slices of one tensor in order."""
    if len(tensors) == 1:
        return tensors[0][None]
    first, whole = tensors[0], tensors[0]._base
    size = first.numel()
    if (
        whole is not None
        and whole.numel() == len(tensors) * size
        and whole.is_contiguous()
        and all(
            x._base is whole and x.is_contiguous() and x.storage_offset() == whole.storage_offset() + i * size
            for i, x in enumerate(tensors)
        )
    ):
        return whole.view(len(tensors), *first.shape)
    return torch.stack(tensors)
