"""Which rows attend to which: host-side index arithmetic, the same for all layers of a pass.

Every row of a sequence attends to spans of rows that the sequence refers to, and to its own sequence's rows up to itself. For every
pool that is one interval a row: `first` to `end`. Legend: T rows of N sequences, S pools of the past.
"""

from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.packing import PlannedTensor, cached_plan

# Rows that a CPU handles together: their mask has as many lines, and all of them read the union of what they attend to.
BUCKET_ROWS, BUCKET_SEQUENCES = 256, 32

Bounds = tuple[tuple[tuple[int, int], ...], ...]


class Part(NamedTuple):
    """Rows `first` to `end` of a pool, to which the rows of a unit attend.

    Attributes:
        pool: number of the pool; S is the sequences' own rows.
        causal: whether the unit's rows are these rows, each of which attends up to itself.
        limits: the interval of each row of the unit, `[rows, 2]`, counted from `first`; None where all attend to all.
    """

    pool: int
    first: int
    end: int
    causal: bool
    limits: PlannedTensor | None

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Which rows of the unit see which of the part, `[rows, end - first]`; None where no mask is needed."""
        if self.limits is None:
            return None
        lower, upper = self.limits.on(device).unbind(1)
        key = torch.arange(self.end - self.first, device=device)
        return (key >= lower[:, None]) & (key < upper[:, None])


class Unit(NamedTuple):
    """Rows that are computed together.

    Attributes:
        start, end: the rows, where they lie side by side in order.
        rows: else their indices.
        parts: what they attend to. Every row sees a row of one of them at least.
    """

    start: int
    end: int
    rows: PlannedTensor | None
    parts: tuple[Part, ...]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The unit's rows of `[T, ...]`."""
        return x[self.start : self.end] if self.rows is None else x.index_select(0, self.rows.on(x.device))

    def put(self, x: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the unit's rows of `[T, ...]`."""
        if self.rows is None:
            x[self.start : self.end] = value
        else:
            x.index_copy_(0, self.rows.on(x.device), value)


def as_bounds(bounds: torch.Tensor) -> Bounds:
    """`RowSpans.bounds` as something that can be the key of a plan."""
    return tuple(tuple((start, end) for start, end in spans) for spans in bounds.tolist())


def intervals(cu_seqlens: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """The interval of every row in every pool, `[S + 1, T, 2]`; empty ones are 0 to 0."""
    lengths = np.diff(cu_seqlens)
    num_pools = len(bounds[0]) if bounds else 0
    found = np.zeros((num_pools + 1, cu_seqlens[-1], 2), dtype=np.int64)
    if num_pools:
        found[:-1] = np.repeat(np.array(bounds, dtype=np.int64), lengths, axis=0).transpose(1, 0, 2)
        found[found[..., 0] >= found[..., 1]] = 0
    found[-1, :, 0] = np.repeat(np.array(cu_seqlens[:-1]), lengths)
    found[-1, :, 1] = np.arange(cu_seqlens[-1]) + 1
    return found


def sorted_sequences(bounds: Bounds, num_sequences: int) -> list[int]:
    """Sequences in the order of their pasts: neighbours refer to much the same rows."""
    return sorted(range(num_sequences), key=lambda n: bounds[n] if bounds else ())


@cached_plan(maxsize=8)
def units(cu_seqlens: tuple[int, ...], bounds: Bounds) -> tuple[Unit, ...]:
    """All rows in units: a long sequence or one without a past is one of its own, short ones that go on from the same rows share one."""
    buckets: list[list[int]] = []
    for n in sorted_sequences(bounds, len(cu_seqlens) - 1):
        last = buckets[-1] if buckets else []
        if last and _together(last, n, cu_seqlens, bounds):
            last.append(n)
        else:
            buckets.append([n])
    table = intervals(cu_seqlens, bounds)
    return tuple(_unit(bucket, cu_seqlens, table) for bucket in buckets)


def _together(bucket: list[int], n: int, cu_seqlens: tuple[int, ...], bounds: Bounds) -> bool:
    """Whether sequence n joins a bucket: it begins at the same rows of the first pool as the others, which are few and short."""
    if not bounds or bounds[bucket[0]][0] == (0, 0) or len(bucket) >= BUCKET_SEQUENCES:
        return False
    rows = sum(cu_seqlens[m + 1] - cu_seqlens[m] for m in (*bucket, n))
    return rows <= BUCKET_ROWS and bounds[n][0][0] == bounds[bucket[0]][0][0]


def _unit(bucket: list[int], cu_seqlens: tuple[int, ...], table: np.ndarray) -> Unit:
    rows = np.concatenate([np.arange(cu_seqlens[n], cu_seqlens[n + 1]) for n in bucket])
    start, end = int(rows[0]), int(rows[-1]) + 1
    in_order = end - start == len(rows) and bool((np.diff(rows) == 1).all())
    parts = []
    for pool, per_row in enumerate(table):
        lower, upper = per_row[rows].T
        seen = upper > lower
        if not seen.any():
            continue
        first, stop = int(lower[seen].min()), int(upper[seen].max())
        own = pool == len(table) - 1
        alone = len(bucket) == 1
        limits = None
        if not alone and not (own is False and (lower == first).all() and (upper == stop).all()):
            limits = PlannedTensor(torch.tensor(np.stack([lower - first, upper - first], 1)).clamp_(0))
        parts.append(Part(pool, first, stop, own and alone, limits))
    return Unit(start, end, None if in_order else PlannedTensor(torch.tensor(rows)), tuple(parts))
