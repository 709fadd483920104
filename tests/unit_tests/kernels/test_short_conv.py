"""The short convolution against torch's own, document by document."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.short_conv import short_conv, short_conv_step_
from refine_kernels.short_conv.reference import KeptTokens
from tests.helpers import output_of_kernel_check, packings, positions, relative_rms


def convolve_by_document(x, weight, silu, cu_seqlens, initial, wanted):
    """The definition by `conv1d`: one document at a time, with its window in front."""
    W = weight.shape[1]
    outputs, windows = [], {}
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        document = torch.cat([initial[n], x[start:end]])
        y = F.conv1d(document.t()[None], weight[:, None], groups=x.shape[1])[0].t()
        outputs.append(F.silu(y) if silu else y)
        for r in range(start + 1, end + 1):
            windows[r] = document[r - start : r - start + W - 1]
    return torch.cat(outputs), torch.stack([windows[r] for r in wanted])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_equals_conv1d_with_windows_and_gradients(data):
    cu_seqlens = data.draw(packings(max_length=20))
    wanted = data.draw(positions(cu_seqlens))
    silu = data.draw(st.booleans())
    W, D = data.draw(st.sampled_from([2, 3, 4])), 3
    g = torch.Generator().manual_seed(0)
    x = torch.randn(cu_seqlens[-1], D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D, W, generator=g, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(len(cu_seqlens) - 1, W - 1, D, generator=g, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight, initial)

    expected = convolve_by_document(x, weight, silu, cu_seqlens, initial, wanted)
    found = short_conv(x, weight, cu_seqlens, silu=silu, initial_window=initial, window_positions=wanted)
    for a, b in zip(found, expected):
        assert relative_rms(a, b) < 1e-12

    def loss(outputs):
        return sum((o * torch.linspace(0.5, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)

    for a, b in zip(torch.autograd.grad(loss(found), inputs), torch.autograd.grad(loss(expected), inputs)):
        assert relative_rms(a, b) < 1e-12


def test_gradients_of_overlapping_windows_are_added_one_round_after_the_other():
    """In no round a token occurs twice, and all rounds together add every gradient."""
    tokens = [0, 1, 2, 1, 2, 3, 2, 7]
    kept = KeptTokens(tokens)
    rounds = [tokens_of_round.on(torch.device("cpu")).tolist() for _, tokens_of_round in kept._rounds]
    assert rounds == [[0, 1, 2, 3, 7], [1, 2], [2]]
    x, grad = torch.arange(16.0).view(8, 2), torch.arange(8.0)[:, None].expand(8, 2)
    assert torch.equal(kept.read(x), x[tokens])
    found = torch.zeros(8, 2)
    kept.add_gradients_(found, grad)
    assert torch.equal(found, torch.zeros(8, 2).index_add_(0, torch.tensor(tokens), grad))


def test_without_initial_window_a_document_starts_from_zeros():
    x, weight = torch.randn(9, 2), torch.randn(2, 4)
    found, _ = short_conv(x, weight, (0, 4, 9))
    zeros = torch.zeros(2, 3, 2)
    expected, _ = convolve_by_document(x, weight, False, (0, 4, 9), zeros, (1,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_steps_in_place_equal_conv1d(W, silu):
    g = torch.Generator().manual_seed(0)
    x, weight, initial = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((12, 5), (5, W), (2, W - 1, 5)))
    expected, windows = convolve_by_document(x, weight, silu, (0, 6, 12), initial, (6, 12))
    found = initial.clone()
    address = found.data_ptr()
    y = torch.stack([short_conv_step_(found, x.view(2, 6, 5)[:, t], weight, silu=silu) for t in range(6)], 1).flatten(0, 1)
    assert relative_rms(y, expected) < 1e-12 and torch.equal(found, windows) and found.data_ptr() == address


def test_kernels_equal_the_reference_in_the_interpreter():
    assert output_of_kernel_check("short_conv_interpreter_check").count("equal:") == 6
