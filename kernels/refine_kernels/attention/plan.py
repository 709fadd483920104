"""Index arithmetic on the host, shared by all layers of a pass: which tokens attend to which.

Every token attends to the spans of past tokens that its sequence refers to, and to its own sequence's tokens up to itself. In every pool
this is one interval per token. Legend: T tokens of N sequences, S pools of the past.
"""

from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.packing import PlannedTensor, cached_plan

# Limits for what a CPU computes together: the mask has one line per token, and every token reads the union of all their spans.
BUCKET_TOKENS, BUCKET_SEQUENCES = 256, 32

Bounds = tuple[tuple[tuple[int, int], ...], ...]


class Part(NamedTuple):
    """Tokens `first` to `end` of a pool, to which the tokens of a unit attend.

    Attributes:
        pool: index of the pool; S stands for the sequences' own tokens.
        causal: whether the unit's tokens are these tokens, each of which attends up to itself.
        limits: the interval of each token of the unit, `[tokens, 2]`, counted from `first`; None if all attend to all.
    """

    pool: int
    first: int
    end: int
    causal: bool
    limits: PlannedTensor | None

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Whether each token of the unit sees each token of the part, `[tokens, end - first]`; None if no mask is needed."""
        if self.limits is None:
            return None
        lower, upper = self.limits.on(device).unbind(1)
        key = torch.arange(self.end - self.first, device=device)
        return (key >= lower[:, None]) & (key < upper[:, None])


class Unit(NamedTuple):
    """Tokens that are computed together.

    Attributes:
        start, end: the tokens, if they are consecutive and in order.
        tokens: their indices, if they are not; otherwise None.
        parts: the parts to which they attend. Every token sees something of at least one of them.
    """

    start: int
    end: int
    tokens: PlannedTensor | None
    parts: tuple[Part, ...]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Reads the unit's tokens of `[T, ...]`."""
        return x[self.start : self.end] if self.tokens is None else x.index_select(0, self.tokens.on(x.device))

    def put(self, x: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the unit's tokens of `[T, ...]`."""
        if self.tokens is None:
            x[self.start : self.end] = value
        else:
            x.index_copy_(0, self.tokens.on(x.device), value)


def as_bounds(bounds: torch.Tensor) -> Bounds:
    """Turns `TokenSpans.bounds` into tuples, which can be the key of a cached plan."""
    return tuple(tuple((start, end) for start, end in spans) for spans in bounds.tolist())


def intervals(cu_seqlens: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """The interval of every token in every pool, `[S + 1, T, 2]`; empty ones are 0 to 0."""
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
    """The sequences in the order of their pasts, so that neighbours refer to nearly the same tokens."""
    return sorted(range(num_sequences), key=lambda n: bounds[n] if bounds else ())


@cached_plan(maxsize=8)
def units(cu_seqlens: tuple[int, ...], bounds: Bounds) -> tuple[Unit, ...]:
    """Divides all tokens into units.

    A sequence that is long or has no past is a unit of its own; short ones whose pasts begin at the same token share one.
    """
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
    """Whether sequence n joins a bucket: its past begins at the same token of the first pool, and the bucket stays small enough."""
    if not bounds or bounds[bucket[0]][0] == (0, 0) or len(bucket) >= BUCKET_SEQUENCES:
        return False
    num_tokens = sum(cu_seqlens[m + 1] - cu_seqlens[m] for m in (*bucket, n))
    return num_tokens <= BUCKET_TOKENS and bounds[n][0][0] == bounds[bucket[0]][0][0]


def _unit(bucket: list[int], cu_seqlens: tuple[int, ...], table: np.ndarray) -> Unit:
    tokens = np.concatenate([np.arange(cu_seqlens[n], cu_seqlens[n + 1]) for n in bucket])
    start, end = int(tokens[0]), int(tokens[-1]) + 1
    in_order = end - start == len(tokens) and bool((np.diff(tokens) == 1).all())
    parts = []
    for pool, per_token in enumerate(table):
        lower, upper = per_token[tokens].T
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
    return Unit(start, end, None if in_order else PlannedTensor(torch.tensor(tokens)), tuple(parts))
