"""Compares the rotation's Triton kernel with the reference, forward and backward, on a CPU. A script that tests run."""

import tests.fla_interpreter  # noqa: F401  isort: skip  before triton compiles anything

import torch

import refine_kernels.rotary.reference as reference
from refine_kernels.rotary import Rotation
from refine_kernels.rotary.rotary_kernels import TritonRotation
from tests.helpers import relative_rms

# Fills the memory that kernels write to with NaN beforehand.
torch.use_deterministic_algorithms(True)
plain = reference._implementation

CASES = [(1, 1, 2), (70, 4, 64), (33, 3, 10), (129, 24, 64), (5, 40, 128), (2, 1, 6)]  # tokens, heads, channels


def run(x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = rotation.apply(leaf.transpose(0, 1).contiguous().transpose(0, 1))  # not contiguous
    (y.to(rotation.cos_TR.dtype) * torch.linspace(-1, 1, y.numel(), dtype=rotation.cos_TR.dtype).view_as(y)).sum().backward()
    return y.detach(), leaf.grad


# The interpreter truncates bfloat16 where a GPU rounds it: twice the error of rounding.
for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    for tokens, heads, channels in CASES:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, heads, channels, generator=draw).to(dtype)
        rotation = Rotation(torch.randint(0, 10**5, (tokens,), generator=draw), channels, 1e6, dtype)
        reference._implementation = plain
        expected = run(x, rotation)
        reference._implementation = lambda _: TritonRotation
        for name, a, b in zip(("out", "gradient"), run(x, rotation), expected):
            assert a.dtype == b.dtype and a.shape == b.shape, (name, a.dtype, a.shape)
            assert relative_rms(a, b) < tolerance, (dtype, tokens, heads, channels, name, relative_rms(a, b))
    print("equal:", dtype, flush=True)
