"""Blocked sliding-window attention against its definition, with pasts, windows and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.rows import LastRows
from refine_kernels.sliding_window import sliding_window_attention
from refine_kernels.sliding_window.reference import attention_by_definition
from tests.helpers import packings, positions, relative_rms


def make_rows(num_rows, H=2, D=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, H, D, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_blocks_equal_the_definition_with_gradients(data):
    cu_seqlens = data.draw(packings(max_documents=3, max_length=150))
    window = data.draw(st.sampled_from([1, 2, 5, 64, 65, 100, 400]))
    q, k, v = make_rows(cu_seqlens[-1])
    num_sequences = len(cu_seqlens) - 1
    past = rows_of_past = None
    past_lengths = []
    inputs = [q, k, v]
    if data.draw(st.booleans()):
        g = torch.Generator().manual_seed(1)
        past = tuple(
            torch.randn(num_sequences, window - 1, 2, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)
        )
        past_lengths = [data.draw(st.integers(0, 2 * window)) for _ in range(num_sequences)]
        inputs += [x for x in past if x.numel()]
        rows_of_past = tuple(map(LastRows.of_batch, past))
    found = sliding_window_attention(q, k, v, cu_seqlens, window, past=rows_of_past, past_lengths=past_lengths).out_THD
    expected = attention_by_definition(q, k, v, cu_seqlens, window, past=past, past_lengths=past_lengths)
    assert relative_rms(found, expected) < 1e-12
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True) for out in (found, expected))):
        assert relative_rms(a, b) < 1e-11


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_continue_the_sequence(data):
    """A row after any position, attending to the position's window, gets what it gets in the whole sequence."""
    cu_seqlens = data.draw(packings(max_documents=3, max_length=100))
    window = data.draw(st.sampled_from([1, 3, 64, 90]))
    wanted = [r for r in data.draw(positions(cu_seqlens)) if r not in cu_seqlens]
    if not wanted:
        return
    q, k, v = make_rows(cu_seqlens[-1])
    whole = sliding_window_attention(q, k, v, cu_seqlens, window, window_positions=wanted)
    lengths = [r - max(start for start in cu_seqlens if start < r) for r in wanted]
    rows = torch.tensor(wanted)
    next_rows = sliding_window_attention(
        q[rows], k[rows], v[rows], range(len(wanted) + 1), window, past=(whole.keys, whole.values), past_lengths=lengths
    )
    assert relative_rms(next_rows.out_THD, whole.out_THD[rows]) < 1e-12


def test_wrong_window_and_packing_are_refused():
    q, k, v = make_rows(10)
    with pytest.raises(ValueError, match="window is 0"):
        sliding_window_attention(q, k, v, (0, 10), 0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        sliding_window_attention(q, k, v, (0, 11), 4)
