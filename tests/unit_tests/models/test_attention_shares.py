"""Even shares of attention between ranks: nothing left out, equal numbers of tokens and of keys, few moves."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_titan.models.attention.shares import AttendedKeys, attention_shares, count, even_shares


def packing(lengths: list[int], num_ranks: int) -> tuple[int, ...]:
    """Documents of these lengths, and one more that makes their tokens a multiple of the ranks."""
    lengths = [*lengths, -sum(lengths) % num_ranks or num_ranks]
    return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))


def keys_by_definition(cu_seqlens, spans) -> int:
    starts = [start for start, end in pairwise(cu_seqlens) for _ in range(start, end)]
    return sum(token - starts[token] + 1 for first, end in spans for token in range(first, end))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_shares_hold_every_token_once_and_equal_work(lengths, num_ranks):
    cu_seqlens = packing(lengths, num_ranks)
    shares = even_shares(cu_seqlens, num_ranks)
    tokens = sorted(token for spans in shares for first, end in spans for token in range(first, end))
    assert tokens == list(range(cu_seqlens[-1]))
    assert all(spans == tuple(sorted(spans)) and count(spans) == cu_seqlens[-1] // num_ranks for spans in shares)
    work = [AttendedKeys(cu_seqlens).of(spans) for spans in shares]
    assert work == [keys_by_definition(cu_seqlens, spans) for spans in shares]
    # A window's work changes by less than the longest document where it moves on by a token; rounding adds up over the windows.
    assert max(work) - min(work) <= 2 * num_ranks * max(b - a for a, b in pairwise(cu_seqlens))


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 64])
def test_ranks_of_one_document_keep_half_of_their_tokens(num_ranks):
    tokens = 1024 * num_ranks
    shares, keys = attention_shares((0, tokens), num_ranks), AttendedKeys((0, tokens))
    work = [keys.of(spans) for spans in shares]
    assert max(work) * num_ranks / sum(work) < 1.001
    # A span before the middle, and one as far behind it: a pair of the ranks that are as far from the middle shares two such pairs.
    for rank, spans in enumerate(shares):
        own = sum(max(0, min(b, 1024 * (rank + 1)) - max(a, 1024 * rank)) for a, b in spans)
        assert len(spans) <= 2 and (own == 512 or num_ranks % 2)


def test_queries_stay_where_moving_them_saves_less_than_it_costs():
    assert attention_shares((0, 512), 2) is None
    assert attention_shares(tuple(range(0, 131073, 4096)), 8) is None  # short documents, equal work
    assert attention_shares(tuple(range(0, 131073, 16384)), 8) is None  # a document a rank
    assert attention_shares((0, 32768), 8) is not None
    # One long document and many short ones: the ranks with the short ones take over.
    cu_seqlens = (0, 65536, *range(66560, 131073, 1024))
    shares, keys = attention_shares(cu_seqlens, 8), AttendedKeys(cu_seqlens)
    work = [keys.of(spans) for spans in shares]
    assert max(work) * 8 / sum(work) < 1.001 and keys.of([(49152, 65536)]) * 8 / sum(work) > 3
