"""Puts weights and tokens of several sequences into one tensor and takes them apart, with few operators and copies.

Legend: g sequences that advance together, H heads, D channels of a head, M hidden channels of the fast network.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from refine_kernels.lact.state import FastWeights
from refine_kernels.packing import PlannedTensor, cached_plan

Joined = tuple[torch.Tensor, ...]
"""Weights of g sequences in one tensor `[g, H, 3, M, D]`, so that each step of an update is one operator. The order is w0, w2, w1: the
two that read the same channels are neighbours, and one product does for both. If M is not D: two tensors, `[g, H, 2, M, D]` with w0 and
w2, and `[g, H, 1, D, M]` with w1."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""The weights as factors of products: the rows of w0 and then of w2, `[g, H, 2 M, D]`, and w1, `[g, H, D, M]`."""


def padded(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks g pieces `[tokens, H, ...]` as `[g, H, most tokens, ...]`, with zeros after shorter ones."""
    longest = max(x.shape[0] for x in pieces)
    equally_long = [x if x.shape[0] == longest else F.pad(x, (*[0, 0] * (x.dim() - 1), 0, longest - x.shape[0])) for x in pieces]
    return stack(equally_long).transpose(1, 2)


def together(weights: Sequence[FastWeights]) -> Joined:
    """Joins the weights of g sequences, `[H, ...]` each."""
    orders = [(0, 2, 1)] if weights[0].w1.shape == weights[0].w0.shape else [(0, 2), (1,)]
    joined = [torch.stack([w[i] for w in weights for i in order], 1) for order in orders]
    if len(weights) == 1:
        return tuple(x[None] for x in joined)
    return tuple(x.unflatten(1, (len(weights), -1)).transpose(0, 1) for x in joined)


def apart(joined: Joined) -> list[FastWeights]:
    """The inverse of `together`: the weights of each sequence."""
    found = []
    for own in zip(*map(unbind, joined)):
        w0, w2, w1 = (w for part in own for w in part.unbind(1))
        found.append(FastWeights(w0, w1, w2))
    return found


def factors(joined: Joined) -> Factors:
    """The weights as factors of products."""
    inner, outer = joined[0].split((2, 1), 2) if len(joined) == 1 else joined
    return inner.flatten(2, 3), outer.squeeze(2)


def from_factors(inner: torch.Tensor, outer: torch.Tensor) -> Joined:
    """The inverse of `factors`."""
    M, D = inner.shape[2] // 2, inner.shape[3]
    if M == D:
        return (torch.cat((inner, outer), 2).unflatten(2, (3, M)),)
    return inner.unflatten(2, (2, M)), outer.unsqueeze(2)


def unbind(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`x.unbind()`; a single entry is a plain view, whose backward copies nothing."""
    return (x.squeeze(0),) if x.shape[0] == 1 else x.unbind()


def take(tensors: Factors, chosen: list[int]) -> Factors:
    """Selects sequences along the first dim; a single entry stands for all of them."""
    if tensors[0].shape[0] == 1 or chosen == list(range(tensors[0].shape[0])):
        return tensors
    index = _index(tuple(chosen)).on(tensors[0].device)
    return tuple(x.index_select(0, index) for x in tensors)


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
