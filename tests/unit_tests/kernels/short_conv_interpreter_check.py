"""Compares the short convolution's Triton kernels with the reference, forward and gradients, on a CPU. A script that tests run."""

import tests.fla_interpreter  # noqa: F401  isort: skip  before triton compiles anything

import torch

import refine_kernels.short_conv.reference as reference
from refine_kernels.short_conv import short_conv, short_conv_step_
from refine_kernels.short_conv.convolution_kernels import Convolution, run_step
from tests.helpers import relative_rms

# Fills the memory that kernels write to with NaN beforehand.
torch.use_deterministic_algorithms(True)
plain = reference._convolution

CASES = [
    # cu_seqlens, channels, filter width, with SiLU, window positions
    ((0, 100), 130, 4, True, (1, 33, 100)),
    ((0, 64), 128, 4, False, ()),
    ((0, 29), 5, 3, True, (2,)),
    ((0, 1, 2, 3), 256, 4, True, (1, 2, 3)),  # a decoding step: one token per sequence
    ((0, 40, 41, 97), 140, 4, True, (41, 60, 97)),
    ((0, 33), 16, 1, True, ()),
    ((0, 2), 7, 4, False, (2,)),
]


def run(x, weight, windows, cu_seqlens, silu, positions):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, windows)]
    y, found = short_conv(leaves[0], leaves[1], cu_seqlens, silu=silu, initial_window=leaves[2], window_positions=positions)
    (y.float().sin().sum() + found.float().cos().sum()).backward()
    return y.detach(), found.detach(), *(t.grad for t in leaves)


# The interpreter truncates bfloat16 where a GPU rounds it: twice the error of rounding.
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for cu_seqlens, channels, width, silu, positions in CASES:
        draw = torch.Generator().manual_seed(0)
        shapes = ((cu_seqlens[-1], channels), (channels, width), (len(cu_seqlens) - 1, width - 1, channels))
        inputs = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
        reference._convolution = plain
        expected = run(*inputs, cu_seqlens, silu, positions)
        reference._convolution = lambda _: Convolution
        for name, a, b in zip(("out", "windows", "x", "weight", "initial"), run(*inputs, cu_seqlens, silu, positions), expected):
            if b.numel() == 0:
                continue
            assert a.dtype == b.dtype and a.shape == b.shape, (name, a.dtype, a.shape)
            assert relative_rms(a, b) < tolerance, (dtype, cu_seqlens, name, relative_rms(a, b))
    print("equal:", dtype, flush=True)

STEPS = [
    # sequences, channels, filter width, with SiLU
    (1, 5, 4, True),
    (3, 300, 4, False),
    (2, 256, 2, True),
    (2, 7, 1, True),
]

for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for N, D, W, silu in STEPS:
        draw = torch.Generator().manual_seed(0)
        x, weight, window = (torch.randn(shape, generator=draw).to(dtype) for shape in ((2, N, D), (D, W), (N, W - 1, D)))
        windows = window.clone(), window.clone()
        for x_ND in x:
            expected = short_conv_step_(windows[0], x_ND, weight, silu=silu)
            found = run_step(windows[1], x_ND, weight, silu)
            assert found.dtype == expected.dtype and relative_rms(found, expected) < tolerance, (dtype, N, D, W)
            assert torch.equal(*windows), (dtype, N, D, W)
    try:
        run_step(torch.zeros(2, 4, 3, dtype=dtype).mT, x_ND, weight, silu)
        raise SystemExit("windows that are not contiguous were accepted")
    except ValueError as error:
        assert "contiguous" in str(error)
    print("equal: step", dtype, flush=True)
