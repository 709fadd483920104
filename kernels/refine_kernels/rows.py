"""Rows that sequences go on from, referred to instead of copied. Legend: T rows of N sequences, R rows of a pool, P places."""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.packing import PlannedTensor, cached_plan


class LastRows(NamedTuple):
    """Of P places the rows right before them.

    Attributes:
        pool: `[R, ...]`.
        end: row of the pool before which each place's rows stand, `[P]`, on the host.
        count: rows of a place. Those that would lie before the pool are any rows.
    """

    pool: torch.Tensor
    end: torch.Tensor
    count: int

    def read(self) -> torch.Tensor:
        """`[P, count, ...]`."""
        num_places = len(self.end)
        rows = _rows_before(tuple(self.end.tolist()), (self.count,) * num_places).on(self.pool.device)
        return self.pool.index_select(0, rows).reshape(num_places, self.count, *self.pool.shape[1:])

    @classmethod
    def of_batch(cls, x: torch.Tensor) -> "LastRows":
        """Of `[P, count, ...]`."""
        num_places, count = x.shape[:2]
        return cls(x.flatten(0, 1), host_tensor([(i + 1) * count for i in range(num_places)]), count)


@cached_plan(maxsize=16)
def _rows_before(ends: tuple[int, ...], counts: tuple[int, ...]) -> PlannedTensor:
    """The last `counts` rows before each of `ends`, the same in all layers; the first row in place of those before it."""
    rows = [torch.arange(end - count, end) for end, count in zip(ends, counts)]
    return PlannedTensor(torch.cat([torch.zeros(0, dtype=torch.long), *rows]).clamp_(0))


def host_tensor(integers: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Integers as a tensor on the host that has values even where tensors have none (FakeTensorMode)."""
    return torch.tensor(integers.tolist() if isinstance(integers, np.ndarray) else list(integers), dtype=torch.long)


def places(positions: Sequence[int]) -> np.ndarray:
    """Positions as an array."""
    return np.arange(positions.start, positions.stop) if isinstance(positions, range) else np.array(positions, dtype=np.int64)


def sequences_before(positions_P: np.ndarray, cu_seqlens: Sequence[int]) -> np.ndarray:
    """Of every position r in 1..T the sequence that holds row r - 1."""
    return np.searchsorted(np.array(cu_seqlens[1:]), positions_P - 1, side="right")


def own_rows(cu_seqlens: Sequence[int], past_counts: Sequence[int]) -> list[int]:
    """Where each sequence's own rows begin in a pool in which `past_counts` rows stand before them."""
    return [start + before for start, before in zip(cu_seqlens, accumulate(past_counts))]


def joined(x: torch.Tensor, cu_seqlens: Sequence[int], past: LastRows | None, past_counts: Sequence[int]) -> torch.Tensor:
    """The pool of `own_rows`: every sequence's rows after its last `past_counts` rows of the past, `x` where there are none.

    Args:
        x: rows of N packed sequences, `[T, ...]`.
        past: of the first sequences; the others, whose counts are 0, have none.
        past_counts: N numbers, each at most `past.count`.
    """
    if not any(past_counts):
        return x
    ends = past.end.tolist()
    rows = _rows_before(tuple(ends), tuple(past_counts[: len(ends)])).on(past.pool.device)
    before = past.pool.index_select(0, rows).to(x.dtype).split(list(past_counts))
    own = x.split([end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])])
    return torch.cat(list(chain.from_iterable(zip(before, own))))
