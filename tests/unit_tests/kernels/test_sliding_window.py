"""Sliding-window attention against its definition, with pasts, windows and gradients, in blocks and through flash attention.

torch's flash attention runs on a GPU only. On a CPU a function written from its documentation replaces it.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_kernels.footprint import gpu_footprint
from refine_kernels.past_tokens import LastTokens
from refine_kernels.sliding_window import attention, flash, sliding_window_attention
from refine_kernels.sliding_window.reference import attention_by_definition
from tests.helpers import packings, positions, relative_rms


def make_inputs(num_tokens, H=2, D=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, H, D, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


def varlen_attn_as_documented(q, k, v, q_starts, k_starts, max_q, max_k, *, window_size):
    """Aligns each sequence's last query with its last key; a query sees the keys from `left` before to `right` after its position."""
    assert q_starts.dtype == k_starts.dtype == torch.int32 and q_starts.device == q.device
    left, right = window_size
    lengths = [(torch.diff(starts)).tolist() for starts in (q_starts, k_starts)]
    assert (max_q, max_k) == tuple(map(max, lengths)) and k_starts[-1] == k.shape[0] == v.shape[0]
    outputs = []
    for queries, keys, values in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1])):
        position = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        key = torch.arange(len(keys))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / q.shape[2] ** 0.5
        seen = (key >= position - left) & (key <= position + right)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.fixture(params=["blocks", "flash"])
def form(request, monkeypatch):
    if request.param == "flash":
        monkeypatch.setattr(attention, "can_flash", lambda q, assumed: True)
        monkeypatch.setattr(flash, "varlen_attn", varlen_attn_as_documented)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_definition_with_gradients(form, data):
    cu_seqlens = data.draw(packings(max_documents=3, max_length=150))
    window = data.draw(st.sampled_from([1, 2, 5, 64, 65, 100, 400]))
    q, k, v = make_inputs(cu_seqlens[-1])
    num_sequences = len(cu_seqlens) - 1
    past = past_in_pools = None
    past_lengths = []
    inputs = [q, k, v]
    if data.draw(st.booleans()):
        g = torch.Generator().manual_seed(1)
        past = tuple(torch.randn(num_sequences, window - 1, 2, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
        past_lengths = [data.draw(st.integers(0, 2 * window)) for _ in range(num_sequences)]
        inputs += [x for x in past if x.numel()]
        past_in_pools = tuple(map(LastTokens.of_batch, past))
    found = sliding_window_attention(q, k, v, cu_seqlens, window, past=past_in_pools, past_lengths=past_lengths).out_THD
    expected = attention_by_definition(q, k, v, cu_seqlens, window, past=past, past_lengths=past_lengths)
    assert relative_rms(found, expected) < 1e-12
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True) for out in (found, expected))):
        assert relative_rms(a, b) < 1e-11


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_continue_the_sequence(form, data):
    """A token after any position, attending to the position's window, gets the output that it gets in the whole sequence."""
    cu_seqlens = data.draw(packings(max_documents=3, max_length=100))
    window = data.draw(st.sampled_from([1, 3, 64, 90]))
    wanted = [r for r in data.draw(positions(cu_seqlens)) if r not in cu_seqlens]
    if not wanted:
        return
    q, k, v = make_inputs(cu_seqlens[-1])
    whole = sliding_window_attention(q, k, v, cu_seqlens, window, window_positions=wanted)
    lengths = [r - max(start for start in cu_seqlens if start < r) for r in wanted]
    tokens = torch.tensor(wanted)
    continued = sliding_window_attention(
        q[tokens], k[tokens], v[tokens], range(len(wanted) + 1), window, past=(whole.keys, whole.values), past_lengths=lengths
    )
    assert relative_rms(continued.out_THD, whole.out_THD[tokens]) < 1e-12


def test_wrong_window_and_packing_are_refused():
    q, k, v = make_inputs(10)
    with pytest.raises(ValueError, match="window is 0"):
        sliding_window_attention(q, k, v, (0, 10), 0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        sliding_window_attention(q, k, v, (0, 11), 4)


@pytest.mark.parametrize(
    "dtype, channels, taken",
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 12, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_flash_attention_takes_16_bit_inputs_of_a_gpu(dtype, channels, taken):
    q = torch.empty(3, 2, channels, dtype=dtype)
    assert flash.can_flash(q, assumed=True) == taken and not flash.can_flash(q)


def test_flash_attention_runs_without_data():
    """torch's operator knows the shapes of its outputs and gradients, which the GPU footprint needs."""
    q, k, v = (torch.empty(50, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    with gpu_footprint():
        out = sliding_window_attention(q, k, v, (0, 30, 50), 8, window_positions=(5,)).out_THD
    assert "varlen" in str(out.grad_fn).lower() and out.shape == (50, 2, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("window", [1, 5, 64, 400])
def test_flash_attention_equals_the_definition_on_a_gpu(window):
    q, k, v = (x.detach().bfloat16().cuda().requires_grad_() for x in make_inputs(300, D=64))
    past = tuple(x.detach().bfloat16().cuda() for x in make_inputs(2 * (window - 1), D=64)[:2])
    past = tuple(x.unflatten(0, (2, window - 1)).requires_grad_() for x in past)
    arguments = dict(past_lengths=[window // 2, 3 * window])
    found = sliding_window_attention(q, k, v, (0, 130, 300), window, past=tuple(map(LastTokens.of_batch, past)), **arguments).out_THD
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, *past)]
    expected = attention_by_definition(*wide[:3], (0, 130, 300), window, past=tuple(wide[3:]), **arguments)
    assert relative_rms(found, expected) < 1e-2
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).cuda()
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x, inputs in ((found, (q, k, v)), (expected, wide[:3]))]
    for a, b in zip(*gradients):
        assert relative_rms(a, b) < 2e-2
