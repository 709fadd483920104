"""Rotary positions against complex numbers, and the kernel against the reference."""

import pytest
import torch

from refine_kernels.rotary import Rotation
from tests.helpers import output_of_kernel_check, relative_rms


@pytest.mark.parametrize("T, heads, channels", [(1, 1, 2), (40, 3, 10), (17, 8, 64)])
def test_is_a_product_of_complex_numbers(T, heads, channels):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(T, heads, channels, dtype=torch.float64, generator=draw).requires_grad_()
    positions = torch.randint(0, 1000, (T,), generator=draw)
    angles = positions[:, None].double() * 10000.0 ** -(torch.arange(channels // 2) / (channels // 2)).double()
    rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([rotated.real, rotated.imag], -1)
    found = Rotation(positions, channels, 10000.0, torch.float64).apply(x)
    assert relative_rms(found, expected) < 1e-4  # angles are float32
    weights = torch.randn(x.shape, dtype=torch.float64, generator=draw)
    pairs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    assert relative_rms(*pairs) < 1e-4


def test_gradient_is_the_derivative():
    rotation = Rotation(torch.tensor([0, 3, 70000]), 6, 1e6, torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.autograd.gradcheck(rotation.apply, x)


def test_bfloat16_is_rounded_once():
    x = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(50) * 1000
    found = Rotation(positions, 8, 1e6, torch.bfloat16).apply(x)
    assert torch.equal(found, Rotation(positions, 8, 1e6, torch.float32).apply(x.float()).bfloat16())


def test_kernel_equals_the_reference_in_the_interpreter():
    assert output_of_kernel_check("rotary_interpreter_check").count("equal:") == 3
