"""For which tokens each rank computes attention, where ranks share a trunk (context parallelism).

Every rank has all keys and values, so any rank can attend for any token. A document's later tokens attend to more keys: of 8 ranks that
share one document and each attend for their own shard, the last one has 1.9 times the mean work. Even shares have equally many tokens and
attend to equally many keys in all, whatever the documents are.

That such shares exist, each of few spans, is the argument of necklace splitting: lay the tokens in a circle. A window of one rank's
length costs the mean at some place, because the mean over all places is the mean, and the cost changes little from one place to the next.
Take the window out, close the circle, and go on with the other ranks. For one document this gives windows around its middle: pairs of
spans at equal distances from both ends.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

Spans = tuple[tuple[int, int], ...]
"""Tokens from `first` to `end` each, ascending, counted in the whole trunk."""

# As long as it takes to move a token's query and output to another rank and back, it could attend to this many keys. A key costs 4
# operations per channel of the query heads, the move 4 bytes; 450e9 bytes per second (NVLink of an H100) over 450e12 operations.
KEYS_PER_MOVED_TOKEN = 1000


class AttendedKeys:
    """How many keys the tokens of a packed trunk attend to, their own included."""

    def __init__(self, cu_seqlens: Sequence[int]):
        self._starts = cu_seqlens
        self._before = list(accumulate(((b - a) * (b - a + 1) // 2 for a, b in zip(cu_seqlens, cu_seqlens[1:])), initial=0))

    def of(self, spans: Sequence[tuple[int, int]]) -> int:
        """The keys of all tokens of the spans, summed."""
        return sum(self._up_to(end) - self._up_to(first) for first, end in spans)

    def _up_to(self, token: int) -> int:
        document = bisect_right(self._starts, token) - 1
        inside = token - self._starts[document]
        return self._before[document] + inside * (inside + 1) // 2


@lru_cache(maxsize=8)
def attention_shares(cu_seqlens: tuple[int, ...], num_ranks: int) -> tuple[Spans, ...] | None:
    """The tokens for which each rank attends; None if each attends for its own shard, because moving queries would cost more than it
    saves.

    Args:
        cu_seqlens: where the documents of the whole trunk begin and end; its tokens are a multiple of the ranks.
    """
    length = cu_seqlens[-1] // num_ranks
    keys, shares = AttendedKeys(cu_seqlens), even_shares(cu_seqlens, num_ranks)
    slowest = max(keys.of([(rank * length, (rank + 1) * length)]) for rank in range(num_ranks))
    moved = max(length - _held(spans, rank, length) for rank, spans in enumerate(shares))
    saved = slowest - max(map(keys.of, shares))
    return shares if saved > KEYS_PER_MOVED_TOKEN * moved else None


def even_shares(cu_seqlens: Sequence[int], num_ranks: int) -> tuple[Spans, ...]:
    """Divides a trunk into one share per rank, with equally many tokens, and equally many keys up to those of a token. A rank gets, of
    what is left, the share of which it holds the most."""
    length = cu_seqlens[-1] // num_ranks
    keys, rest = AttendedKeys(cu_seqlens), ((0, cu_seqlens[-1]),)
    shares: dict[int, Spans] = {}

    def take(share: Spans) -> None:
        free = (rank for rank in range(num_ranks) if rank not in shares)
        shares[max(free, key=lambda rank: _held(share, rank, length))] = share

    for left in range(num_ranks, 1, -1):
        place = _place_of_even_window(keys, rest, length, left)
        take(_window(rest, place, length))
        rest = _window(rest, place + length, (left - 1) * length)
    take(rest)
    return tuple(shares[rank] for rank in range(num_ranks))


def clipped(spans: Spans, first: int, end: int) -> Spans:
    """The parts of the spans that lie between two tokens."""
    return tuple((max(a, first), min(b, end)) for a, b in spans if a < end and b > first)


def count(spans: Spans) -> int:
    """Number of tokens."""
    return sum(end - first for first, end in spans)


def _held(spans: Spans, rank: int, length: int) -> int:
    """How many of the tokens are in a rank's own shard."""
    return count(clipped(spans, rank * length, (rank + 1) * length))


def _place_of_even_window(keys: AttendedKeys, rest: Spans, length: int, left: int) -> int:
    """Where in the circle of the tokens of the `left` remaining ranks a window begins whose tokens have the mean work of a rank."""
    mean = keys.of(rest) / left

    def excess(place: int) -> float:
        return keys.of(_window(rest, place, length)) - mean

    # The windows at whole lengths have the mean together, so two neighbours lie on either side of it.
    borders = [excess(i * length) for i in range(left)]
    i = next(i for i in range(left) if borders[i] * borders[(i + 1) % left] <= 0)
    low, high, rising = i * length, (i + 1) * length, borders[i] <= borders[(i + 1) % left]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (excess(middle) <= 0) == rising else (low, middle)
    return min((low, high), key=lambda place: abs(excess(place)))


def _window(rest: Spans, place: int, size: int) -> Spans:
    """`size` tokens from a place in the circle of the remaining ones, ascending."""
    total = count(rest)
    place %= total
    end = place + size
    return _between(rest, 0, end - total) + _between(rest, place, min(end, total))


def _between(rest: Spans, place: int, end: int) -> Spans:
    """The tokens between two places among the remaining ones."""
    found, before = [], 0
    for first, stop in rest:
        a, b = max(first + place - before, first), min(first + end - before, stop)
        if a < b:
            found.append((a, b))
        before += stop - first
    return tuple(found)
