"""Attention against its definition, with pasts and gradients: in the form for a CPU, and through the calls that a GPU takes.

torch's flash attention for packed sequences runs on a GPU only, and flex attention has no backward on a CPU (torch 2.13.0). On a CPU a
function written from its documentation replaces the former, and the latter's check of the device is switched off.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_kernels.attention import attend, attention, attention_step, intervals
from refine_kernels.attention.reference import attention_by_definition
from refine_kernels.footprint import gpu_footprint
from refine_kernels.packing import forget_plans
from refine_kernels.past_tokens import TokenSpans, host_tensor
from tests.helpers import boundaries, packings, positions, relative_rms


def draw_tokens(num_tokens: int, heads: int, D: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, heads, D, generator=g, dtype=torch.float64).requires_grad_()


def spans(pools: Sequence[torch.Tensor], bounds: list) -> TokenSpans:
    return TokenSpans(tuple(pools), host_tensor(np.array(bounds).reshape(-1)).view(-1, len(pools), 2))


def varlen_attn_as_documented(q, k, v, q_starts, k_starts, max_q, max_k, *, window_size, enable_gqa):
    """Aligns each sequence's last query with its last key; a query sees its own position and all before."""
    assert q_starts.dtype == k_starts.dtype == torch.int32 and window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    lengths = [torch.diff(starts).tolist() for starts in (q_starts, k_starts)]
    assert (max_q, max_k) == tuple(map(max, lengths)) and k_starts[-1] == k.shape[0]
    parts = zip(*(x.split(lengths[i]) for i, x in ((0, q), (1, k), (1, v))))
    before = [(keys[: len(keys) - len(queries)], values[: len(keys) - len(queries)]) for queries, keys, values in parts]
    own_k, own_v = (torch.cat([x[len(x) - n :] for x, n in zip(y.split(lengths[1]), lengths[0])]) for y in (k, v))
    return attention_by_definition(q, own_k, own_v, q_starts.tolist(), *zip(*before))


@pytest.fixture(params=["cpu", "gpu"])
def form(request, monkeypatch):
    if request.param == "gpu":
        monkeypatch.setattr(attend, "is_for_gpu", lambda x: True)
        monkeypatch.setattr(attend, "can_flash", lambda q: True)
        monkeypatch.setattr(intervals, "varlen_attn", varlen_attn_as_documented)
        monkeypatch.setattr(intervals.flex, "_validate_device", lambda *a: None)
        monkeypatch.setattr(intervals, "_flex_attention", lambda: intervals.flex.flex_attention)
    forget_plans()


def assert_equal_with_gradients(found, expected, inputs):
    assert relative_rms(found, expected) < 1e-13
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True) for out in (found, expected)]
    for a, b in zip(*gradients):
        assert relative_rms(a, b) < 1e-12


HEADS = st.sampled_from([(1, 1, 3), (4, 4, 8), (4, 2, 5), (6, 1, 16)])
PATCHED = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=50, **PATCHED)
@given(data=st.data())
def test_packed_documents_and_rows_before_the_first(form, data):
    cu_seqlens = data.draw(packings(max_documents=4))
    H, K, D = data.draw(HEADS)
    seen = data.draw(st.sampled_from([0, 0, 1, 70]))
    q, k, v = (draw_tokens(cu_seqlens[-1] + extra, heads, D, i) for i, (heads, extra) in enumerate(((H, 0), (K, seen), (K, seen))))
    found = attention(q, k, v, cu_seqlens)
    none = [k[:0]] * (len(cu_seqlens) - 2)
    expected = attention_by_definition(q, k[seen:], v[seen:], cu_seqlens, [k[:seen], *none], [v[:seen], *none])
    assert_equal_with_gradients(found, expected, (q, k, v))


@settings(max_examples=25, **PATCHED)
@given(data=st.data())
def test_branches_attend_to_their_prefix_and_themselves(form, data):
    """Branches at any position of a packed trunk, some with tokens of a second pool, some without a past."""
    cu_seqlens = data.draw(packings(max_documents=3))
    H, K, D = data.draw(HEADS)
    starts = data.draw(positions(cu_seqlens, max_count=9))
    lengths = data.draw(st.one_of(st.just([3] * len(starts)), st.lists(st.integers(1, 40), min_size=len(starts), max_size=len(starts))))
    branches = boundaries(lengths)
    bounds = []
    for r in starts:
        document = max(start for start in cu_seqlens if start < r)
        second = data.draw(st.sampled_from([(0, 0), (0, 0), (2, 7), (0, 9)]))
        bounds.append(((document, r) if data.draw(st.integers(0, 9)) else (5, 5), second))
    sizes = ((branches[-1], H), (branches[-1], K), (branches[-1], K), (cu_seqlens[-1], K), (cu_seqlens[-1], K), (9, K), (9, K))
    q, k, v, *pools = inputs = [draw_tokens(length, heads, D, i) for i, (length, heads) in enumerate(sizes)]
    past = spans(pools[::2], bounds), spans(pools[1::2], bounds)
    found = attention(q, k, v, branches, past=past)
    expected = attention_by_definition(q, k, v, branches, past[0].read(), past[1].read())
    assert_equal_with_gradients(found, expected, inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_block_mask_lists_what_queries_see(data):
    """Every visible pair lies in a listed block, and a block that is listed as full has only visible pairs."""
    block, num_keys = 4, data.draw(st.integers(1, 40))
    interval = st.tuples(st.integers(0, num_keys), st.integers(0, num_keys))
    limits = np.array([(a, b) if a < b else (0, 0) for a, b in data.draw(st.lists(interval, min_size=1, max_size=30))])
    original, intervals.BLOCK = intervals.BLOCK, block
    try:
        partial, full = intervals._blocks(limits, num_keys)
    finally:
        intervals.BLOCK = original
    key = np.arange(num_keys)
    visible = (key >= limits[:, :1]) & (key < limits[:, 1:])
    assert not (partial & full).any()
    for i, j in np.ndindex(partial.shape):
        inside = visible[i * block : (i + 1) * block, j * block : (j + 1) * block]
        assert (partial | full)[i, j] or not inside.any()
        assert not full[i, j] or (inside.all() and inside.shape == (block, block))


def test_pools_are_kept_once_however_many_branches():
    """The memory that backward needs grows with the tokens, not with the tokens times the branches."""

    def kept(num_branches: int) -> int:
        k, v = (draw_tokens(1000, 2, 8, i) for i in range(2))
        q, own_k, own_v = (draw_tokens(2 * num_branches, heads, 8, i) for i, heads in enumerate((4, 2, 2)))
        bounds = [((0, 1000 - i),) for i in range(num_branches)]
        storages = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(q, own_k, own_v, range(0, 2 * num_branches + 1, 2), past=(spans([k], bounds), spans([v], bounds)))
        return sum(storages.values())

    per_branch = 8 * 2 * (4 * 8 + 2 * 2 * 8 + 4 * 8 + 4)  # queries, own keys and values, outputs, log-sums of two tokens
    assert kept(100) - kept(10) == 90 * per_branch


def test_pool_of_which_nothing_is_read_gets_zeros(form):
    q, k, v, keys, values = (draw_tokens(length, 2, 4, 0) for length in (3, 3, 3, 9, 9))
    past = spans([keys], [((4, 4),)]), spans([values], [((4, 4),)])
    found = attention(q, k, v, (0, 3), past=past)
    assert relative_rms(found, attention(q, k, v, (0, 3))) < 1e-14
    gradients = torch.autograd.grad(found.sum(), (keys, values))
    assert all(not g.any() for g in gradients)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_next_tokens_equal_the_definition(data):
    H, K, D = data.draw(HEADS)
    n, count = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    bounds = [((0, data.draw(st.integers(0, 50))), (3, data.draw(st.integers(3, 20)))) for _ in range(n)]
    q, keys, values, more_keys, more_values = (
        draw_tokens(r, h, D, i).detach() for i, (r, h) in enumerate(((n, H), (50, K), (50, K), (20, K), (20, K)))
    )
    own = [draw_tokens(count * n, K, D, 10 + i).detach().view(count, n, K, D) for i in range(2)]
    past = spans([keys, more_keys], bounds), spans([values, more_values], bounds)
    found = attention_step(q, *past, *own)
    before = [[torch.cat([x, y[:-1, i]]) for i, x in enumerate(p.read())] for p, y in zip(past, own)]
    expected = attention_by_definition(q, own[0][-1], own[1][-1], range(n + 1), *before)
    assert relative_rms(found, expected) < 1e-13


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision_stays_near_the_definition(dtype, tolerance):
    """Heads have as many channels as allowed; a pass and a decoding step agree with the definition up to the precision of the dtype."""
    H, K, D = 4, 2, 256
    exact = [draw_tokens(length, heads, D, i).detach() for i, (length, heads) in enumerate(((8, H), (8, K), (8, K), (300, K), (300, K)))]
    narrow = [x.to(dtype).requires_grad_() for x in exact]
    q, k, v, *pools = [x.detach().double().requires_grad_() for x in narrow]
    bounds = [((0, 200),), ((0, 300),), ((10, 11),), ((5, 280),)]
    expected = attention_by_definition(q, k, v, (0, 2, 4, 6, 8), *(spans([x], bounds).read() for x in pools))
    past = [spans([x], bounds) for x in narrow[3:]]
    found = attention(*narrow[:3], (0, 2, 4, 6, 8), past=tuple(past))
    assert found.dtype == dtype and relative_rms(found, expected) < tolerance
    wide = torch.autograd.grad(expected.sum(), (q, k, v, *pools))
    for a, b in zip(torch.autograd.grad(found.sum(), narrow), wide):
        assert relative_rms(a, b) < 3 * tolerance
    step = attention_step(narrow[0][::2].detach(), *past, *(x.detach()[None, ::2] for x in narrow[1:3]))
    assert relative_rms(step, expected[::2]) < tolerance


def test_forms_of_a_gpu_run_without_data():
    """The estimate of memory runs without data: both kernels know the shapes of their outputs and gradients."""
    q, k, v = (torch.empty(50, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    bounds = [((0, 30),), ((0, 20),)]
    with gpu_footprint():
        trunk = attention(q, k, v, (0, 30, 50))
        branches = attention(q[:6], k[:6], v[:6], (0, 3, 6), past=(spans([k], bounds), spans([v], bounds)))
    assert "varlen" in str(trunk.grad_fn).lower() and trunk.shape == q.shape and branches.shape == (6, 4, 16)
    assert [g.shape for g in torch.autograd.grad(trunk.float().sum() + branches.float().sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_what_does_not_fit_is_refused():
    q, k = torch.zeros(4, 3, 8), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="multiple of key heads, got 3 and 2"):
        attention(q, k, k, (0, 4))
    with pytest.raises(ValueError, match="264 channels; allowed: up to 256"):
        attention(*(torch.zeros(4, 2, 264),) * 3, (0, 4))
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(k, k, k, (0, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash and flex attention need a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("H, K, D", [(4, 4, 64), (8, 2, 256), (30, 30, 128)])
def test_kernels_of_a_gpu_equal_the_definition(H, K, D, dtype, tolerance):
    trunk, starts, k_len = (0, 300, 1000), [1, 77, 300, 301, 640, 640, 1000], 5
    branches = range(0, k_len * len(starts) + 1, k_len)
    sizes = ((1000, H), (1000, K), (1000, K), (branches[-1], H), (branches[-1], K), (branches[-1], K))
    narrow = [draw_tokens(r, h, D, i).detach().cuda().to(dtype).requires_grad_() for i, (r, h) in enumerate(sizes)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    bounds = [((0 if r <= 300 else 300, r),) for r in starts]
    found, expected = [], []
    for x, out, run in ((narrow, found, attention), (wide, expected, None)):
        past = spans([x[1]], bounds), spans([x[2]], bounds)
        if run is attention:
            out += [attention(*x[:3], trunk), attention(*x[3:], branches, past=past)]
        else:
            out += [attention_by_definition(*x[:3], trunk), attention_by_definition(*x[3:], branches, past[0].read(), past[1].read())]
    assert all(relative_rms(a, b) < tolerance for a, b in zip(found, expected))
    gradients = [torch.autograd.grad(sum(x.sum() for x in out), inputs) for out, inputs in ((found, narrow), (expected, wide))]
    assert all(relative_rms(a, b) < 3 * tolerance for a, b in zip(*gradients))


def test_spans_without_their_first_tokens():
    pools = [torch.arange(10.0), torch.arange(100.0, 120.0)]
    found = spans(pools, [[(2, 5), (1, 4)], [(0, 0), (3, 9)], [(4, 7), (0, 0)]])
    whole = found.read()
    for counts in ([0, 0, 0], [2, 1, 3], [3, 6, 1], [5, 0, 2]):
        cut = found.without_first(counts)
        assert cut.lengths == [len(x) - n for x, n in zip(whole, counts)]
        assert all(torch.equal(part, x[n:]) for part, x, n in zip(cut.read(), whole, counts))
