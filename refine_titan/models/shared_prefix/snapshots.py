"""Snapshots: the states of every layer at regular positions of a trunk, kept by the pass that reads it."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from refine_kernels.packing import sequence_of_token
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix.layer_state import LayerState
from refine_titan.models.shared_prefix.layout import SharedPrefixLayout

Output = TypeVar("Output")  # the decoder's `DecoderOutput`; the decoder imports this package


@dataclass(frozen=True)
class SnapshotBank:
    """States of every layer at regular positions, the boundaries, of one rank's part of a trunk.

    Attributes:
        shard: the trunk's documents and the rank's part of it.
        stride: distance of the boundaries inside a document, in tokens.
        positions: the boundaries, counted in the whole trunk, ascending; a document's own start, where nothing has been read, is none.
        layers: one `LayerState` per layer over the boundaries.
    """

    shard: ContextShard
    stride: int
    positions: tuple[int, ...] | range
    layers: list[LayerState]

    @staticmethod
    def boundaries(shard: ContextShard, stride: int) -> tuple[int, ...] | range:
        """The positions every `stride` tokens of each document that lie inside the shard, without the document's start and end; besides
        them the shard's beginning where an earlier rank has begun a document. With a stride of 1 the ends of documents too."""
        cu_seqlens, begin, end = shard.cu_seqlens, shard.begin, shard.end
        if stride == 1:
            return range(begin if shard.seen else begin + 1, end)
        arrival = (begin,) if shard.seen else ()
        regular = (
            r
            for start, stop in zip(cu_seqlens, cu_seqlens[1:])
            if start < end and stop > begin
            for r in range(start + max((begin - start) // stride + 1, 1) * stride, min(stop, end), stride)
        )
        return (*arrival, *regular)

    def boundary_before(self, start: int) -> tuple[int, int | None]:
        """The last boundary before the last prefix token of a branch at `start`, which the shard owns.

        Returns:
            The boundary and its index in `layers`; or the start of the branch's document, and None, where there is no boundary before.
        """
        cu_seqlens = self.shard.cu_seqlens
        document_start = cu_seqlens[sequence_of_token(cu_seqlens, start - 1)]
        boundary = document_start + (start - 1 - document_start) // self.stride * self.stride
        boundary = max(boundary, self.shard.begin)
        if boundary == document_start:
            return document_start, None
        return boundary, bisect.bisect_left(self.positions, boundary)


def read_with_snapshots(
    forward: Callable[..., Output],
    tokens_T: torch.Tensor,
    shard: ContextShard,
    stride: int,
    *,
    labels: torch.Tensor | None = None,
    entropy: bool = False,
) -> tuple[Output, SnapshotBank]:
    """Reads a rank's shard of a trunk and keeps the states at every `stride` tokens of each document.

    Args:
        forward: runs the model, in the precision of the run.
        tokens_T: tokens of the whole trunk, of which the shard's are read.
        stride: what the model's `snapshot_stride` makes of the configured distance.
        labels: next tokens of the whole trunk (-100 for none); None for no loss.
        entropy: whether to compute the entropy of every next-token distribution.

    Returns:
        The forward's output over the shard's tokens without its states, and the states.
    """
    positions = SnapshotBank.boundaries(shard, stride)
    out = forward(
        tokens_T[shard.tokens],
        SharedPrefixLayout(shard.local_cu_seqlens, state_positions=shard.local(positions), shard=shard),
        labels=None if labels is None else labels[shard.tokens],
        entropy=entropy,
    )
    return out._replace(states=[]), SnapshotBank(shard, stride, positions, out.states)
