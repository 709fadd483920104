"""Moves rows between the ranks that hold their tokens and those that compute with them. Differentiable; backward moves the gradients back.

Every rank's share has as many tokens as its shard, so that every rank takes part in each exchange and in its backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from refine_titan.models.attention.shares import Spans, clipped, count
from refine_titan.models.context_shard import ContextShard


def rows_of_share(x_T: torch.Tensor, shares: Sequence[Spans], shard: ContextShard) -> torch.Tensor:
    """The rows of this rank's share, `shares[rank]`, from the ranks that hold them; `x_T` are the rows of this rank's shard."""
    return _MovedRows.apply(x_T, _Exchange.between(shares, shard), False)


def rows_of_shard(x_T: torch.Tensor, shares: Sequence[Spans], shard: ContextShard) -> torch.Tensor:
    """The rows of this rank's shard, from the ranks that have them in their shares; `x_T` are the rows of this rank's share."""
    return _MovedRows.apply(x_T, _Exchange.between(shares, shard), True)


class _Exchange(NamedTuple):
    """What this rank exchanges.

    Attributes:
        pieces: rows of this rank's shard, from first to end each, in the order of the ranks whose shares have them.
        lent: how many of them each rank has.
        borrowed: how many rows of this rank's share each rank holds.
        group: the ranks.
    """

    pieces: Spans
    lent: list[int]
    borrowed: list[int]
    group: dist.ProcessGroup

    @classmethod
    def between(cls, shares: Sequence[Spans], shard: ContextShard) -> "_Exchange":
        n, own = shard.num_tokens, shares[shard.group.rank()]
        lent = [clipped(spans, shard.begin, shard.end) for spans in shares]
        borrowed = [count(clipped(own, rank * n, (rank + 1) * n)) for rank in range(len(shares))]
        pieces = tuple((a - shard.begin, b - shard.begin) for spans in lent for a, b in spans)
        return cls(pieces, [count(spans) for spans in lent], borrowed, shard.group)

    def to_share(self, x: torch.Tensor) -> torch.Tensor:
        found = x.new_empty(sum(self.borrowed), *x.shape[1:])
        dist.all_to_all_single(found, torch.cat([x[a:b] for a, b in self.pieces]), self.borrowed, self.lent, group=self.group)
        return found

    def to_shard(self, x: torch.Tensor) -> torch.Tensor:
        found = x.new_empty(sum(self.lent), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), self.lent, self.borrowed, group=self.group)
        parts = zip(self.pieces, found.split([b - a for a, b in self.pieces]))
        return torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0])])


class _MovedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exchange, back):
        ctx.exchange, ctx.back = exchange, back
        return exchange.to_shard(x) if back else exchange.to_share(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (ctx.exchange.to_share(grad) if ctx.back else ctx.exchange.to_shard(grad)), None, None
