"""The blockwise head against whole logits."""

import pytest
import torch

from refine_kernels.linear_head import chunked, linear_head_losses
from refine_kernels.linear_head.reference import dense_head_losses
from tests.helpers import relative_rms


@pytest.mark.parametrize("T, block_tokens", [(1, 1), (7, 3), (8, 4), (50, None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_whole_logits(T, block_tokens, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, 6, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (T,), generator=g)
    labels[T // 2] = -100
    expected = dense_head_losses(hidden, weight, labels)
    found = linear_head_losses(hidden, weight, labels, entropy=True, block_tokens=block_tokens)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b in zip(found[:3], expected[:3]):
        assert relative_rms(a, b) < tolerance
    assert found.hit_T is None
    # The loss may be a term of a larger one, with a factor.
    for a, b in zip(
        torch.autograd.grad(found.nll_sum * 0.3, (hidden, weight)),
        torch.autograd.grad(expected.nll_sum * 0.3, (hidden, weight)),
    ):
        assert relative_rms(a, b) < tolerance


@pytest.mark.parametrize("vocabulary, largest", [(1 << 17, 512), (1 << 12, 4096)])
def test_blocks_are_bounded_by_logits_and_large_enough_for_the_weights(vocabulary, largest, monkeypatch):
    blocks, linear = [], chunked.as_logits
    monkeypatch.setattr(chunked, "as_logits", lambda product: blocks.append(product.shape[0]) or linear(product))
    hidden, weight = torch.randn(5000, 1), torch.randn(vocabulary, 1)
    linear_head_losses(hidden[: largest + 1], weight, torch.zeros(largest + 1, dtype=torch.long))
    assert blocks == [largest, 1]


def test_entropy_alone_needs_no_labels():
    hidden, weight = torch.randn(9, 4), torch.randn(5, 4)
    labels = torch.zeros(9, dtype=torch.long)
    found = linear_head_losses(hidden, weight, None, entropy=True, block_tokens=2)
    assert found.nll_sum is None
    torch.testing.assert_close(found.entropy_T, dense_head_losses(hidden, weight, labels).entropy_T)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    linear_head_losses(hidden, weight, torch.tensor([1, 2, 3, 4])).nll_sum.backward()
    assert hidden.grad is not None and weight.grad is None


def test_labels_that_are_the_likeliest_tokens_are_counted_without_gradient():
    hidden, weight = torch.randn(50, 6), torch.nn.Parameter(torch.randn(5, 6))
    labels = torch.randint(0, 5, (50,))
    labels[7] = -100
    with torch.no_grad():
        found = linear_head_losses(hidden, weight, labels, block_tokens=8)
        expected = dense_head_losses(hidden, weight, labels)
    assert 0 < expected.hit_T.sum() < 50 and not found.hit_T[7]
    assert torch.equal(found.hit_T, expected.hit_T)
