"""Past tokens that sequences continue from, kept as indices into a pool of vectors instead of copies.

Legend: T tokens of N packed sequences, R tokens of a pool, P places (positions to continue from).
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.packing import PlannedTensor, cached_plan


class LastTokens(NamedTuple):
    """The last `count` tokens before each of P places.

    Attributes:
        pool: vectors of all tokens, `[R, ...]`.
        end: index into the pool right after each place's last token, `[P]`, on the host.
        count: tokens of each place. Where fewer than `count` tokens precede `end` in the pool, the missing ones have arbitrary values.
    """

    pool: torch.Tensor
    end: torch.Tensor
    count: int

    def read(self) -> torch.Tensor:
        """Copies the tokens out of the pool, `[P, count, ...]`."""
        num_places = len(self.end)
        index = _indices_before(tuple(self.end.tolist()), (self.count,) * num_places).on(self.pool.device)
        return self.pool.index_select(0, index).reshape(num_places, self.count, *self.pool.shape[1:])

    @classmethod
    def of_batch(cls, x: torch.Tensor) -> "LastTokens":
        """The tokens of `x`, `[P, count, ...]`, as a pool of their own."""
        num_places, count = x.shape[:2]
        return cls(x.flatten(0, 1), host_tensor([(i + 1) * count for i in range(num_places)]), count)


@cached_plan(maxsize=16)
def _indices_before(ends: tuple[int, ...], counts: tuple[int, ...]) -> PlannedTensor:
    """Pool indices of the last `counts` tokens before each of `ends`, shared by all layers; 0 for indices below 0."""
    spans = [torch.arange(end - count, end) for end, count in zip(ends, counts)]
    return PlannedTensor(torch.cat([torch.zeros(0, dtype=torch.long), *spans]).clamp_(0))


class TokenSpans(NamedTuple):
    """For each of P places, one span of tokens in each of S pools.

    Attributes:
        pools: vectors of the pools' tokens, S tensors `[R_s, ...]`.
        bounds: `[P, S, 2]` on the host: place p refers to tokens `bounds[p, s, 0]` to `bounds[p, s, 1]` of pool s.
    """

    pools: tuple[torch.Tensor, ...]
    bounds: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each place, in all pools together."""
        return (self.bounds[..., 1] - self.bounds[..., 0]).sum(1).tolist()

    def read(self) -> tuple[torch.Tensor, ...]:
        """Copies the tokens of each place out of the pools, in the order of the pools."""
        return tuple(torch.cat([pool[start:end] for pool, (start, end) in zip(self.pools, spans)]) for spans in self.bounds.tolist())

    def without_first(self, counts: Sequence[int]) -> "TokenSpans":
        """Spans without the first tokens of each place, as many as `counts` says, at most all of them."""
        bounds = self.bounds.clone()
        lengths = bounds[..., 1] - bounds[..., 0]
        before = lengths.cumsum(1) - lengths
        bounds[..., 0] += (host_tensor(counts)[:, None] - before).clamp_(min=0).minimum(lengths)
        return TokenSpans(self.pools, bounds)

    def compact(self) -> "TokenSpans":
        """The same tokens, copied into one pool of their own."""
        ends = [0, *accumulate(self.lengths)]
        return TokenSpans((torch.cat(self.read()),), host_tensor([row for span in zip(ends, ends[1:]) for row in span]).view(-1, 1, 2))

    def extended(self, pool: torch.Tensor, place_of: np.ndarray, own: np.ndarray) -> "TokenSpans":
        """Spans of Q new places: place q has the spans of place `place_of[q]`, and tokens `own[q, 0]` to `own[q, 1]` of another pool."""
        before = self.bounds.index_select(0, host_tensor(place_of))
        return TokenSpans((*self.pools, pool), torch.cat([before, host_tensor(own.reshape(-1)).view(-1, 1, 2)], 1))

    @staticmethod
    def cat(parts: "Sequence[TokenSpans]") -> "TokenSpans":
        """Concatenates the places of all parts. A pool that several parts have is kept once."""
        pools = {id(pool): pool for part in parts for pool in part.pools}
        bounds = []
        for part in parts:
            for spans in part.bounds.tolist():
                found = {id(pool): span for pool, span in zip(part.pools, spans)}
                bounds += [row for key in pools for row in found.get(key, (0, 0))]
        return TokenSpans(tuple(pools.values()), host_tensor(bounds).view(-1, len(pools), 2))


def host_tensor(integers: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Integers as an int64 tensor on the host, with values even under FakeTensorMode."""
    return torch.tensor(integers.tolist() if isinstance(integers, np.ndarray) else list(integers), dtype=torch.long)


def position_array(positions: Sequence[int]) -> np.ndarray:
    """Positions as an int64 array."""
    return np.arange(positions.start, positions.stop) if isinstance(positions, range) else np.array(positions, dtype=np.int64)


def sequences_before(positions_P: np.ndarray, cu_seqlens: Sequence[int]) -> np.ndarray:
    """Index of the sequence that holds token r - 1, for every position r in 1..T."""
    return np.searchsorted(np.array(cu_seqlens[1:]), positions_P - 1, side="right")


def own_starts(cu_seqlens: Sequence[int], past_counts: Sequence[int]) -> list[int]:
    """Pool index of each sequence's first token, in a pool that has `past_counts` past tokens before each sequence."""
    return [start + before for start, before in zip(cu_seqlens, accumulate(past_counts))]


def joined(x: torch.Tensor, cu_seqlens: Sequence[int], past: LastTokens | None, past_counts: Sequence[int]) -> torch.Tensor:
    """The pool that `own_starts` describes: each sequence's last `past_counts` past tokens, then its own. Without past, `x` itself.

    Args:
        x: vectors of T tokens in N packed sequences, `[T, ...]`.
        past: past tokens of the first sequences; the counts of the others are 0.
        past_counts: N numbers, each at most `past.count`.
    """
    if not any(past_counts):
        return x
    ends = past.end.tolist()
    index = _indices_before(tuple(ends), tuple(past_counts[: len(ends)])).on(past.pool.device)
    before = past.pool.index_select(0, index).to(x.dtype).split(list(past_counts))
    own = x.split([end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])])
    return torch.cat(list(chain.from_iterable(zip(before, own))))
