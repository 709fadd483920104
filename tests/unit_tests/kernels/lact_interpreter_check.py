"""Compares LaCT's Triton kernels with plain torch, forward and gradients, on a CPU. A script that tests run."""

import tests.fla_interpreter  # noqa: F401  isort: skip  before triton compiles anything

import torch
from fla.modules.activations import swiglu

from refine_kernels.gated_silu import gated_silu
from refine_kernels.lact.elementwise import unit_vectors, writing_factors
from refine_kernels.lact.elementwise_kernels import UnitVectors, WritingFactors
from tests.helpers import relative_rms

# Fills the memory that kernels write to with NaN beforehand.
torch.use_deterministic_algorithms(True)

UNIT_CASES = [(1, 1, 4, True), (130, 2, 16, True), (257, 3, 40, False), (300, 1, 384, True)]  # tokens, heads, channels, SiLU
FACTOR_CASES = [(1, 1, 1, 3), (2, 3, 17, 24), (1, 2, 65, 384)]  # sequences, heads, tokens, hidden channels


def run(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    wide = torch.promote_types(out[0].dtype, torch.float32)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=wide).view(x.shape) for x in out]
    sum((x.to(wide) * w).sum() for x, w in zip(out, weights)).backward()
    return [*(x.detach() for x in out), *(x.grad for x in leaves)]


def compare(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, case) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (case, i, a.dtype, a.shape)
        assert relative_rms(a, b) < tolerance, (case, i, relative_rms(a, b))


# Plain torch rounds the result of every operator to bfloat16; the interpreter truncates where a GPU rounds.
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    for tokens, heads, channels, silu in UNIT_CASES:
        draw = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=draw) for shape in ((tokens, heads, channels), (heads, channels), (heads, channels))]
        inputs = [x.to(dtype) for x in inputs]
        expected = run(lambda *x, silu=silu: unit_vectors(*x, silu=silu), inputs)
        compare(run(lambda *x, silu=silu: UnitVectors.apply(*x, silu), inputs), expected, tolerance, (dtype, tokens, heads, channels, silu))
    for sequences, heads, tokens, hidden in FACTOR_CASES:
        draw = torch.Generator().manual_seed(0)
        shape = (sequences, heads, tokens)
        inputs = [torch.randn(*shape, hidden, generator=draw).to(dtype) for _ in range(3)]
        inputs.append(torch.rand(*shape, 3, generator=draw, dtype=torch.promote_types(dtype, torch.float32)))
        compare(run(WritingFactors.apply, inputs), run(writing_factors, inputs), tolerance, (dtype, shape, hidden))
    print("equal:", dtype, flush=True)

# flash-linear-attention's kernel, in the dtype of training and in float32.
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    inputs = [torch.randn(3, 2, 17, 40, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1)]
    compare(run(swiglu, inputs), run(gated_silu, inputs), tolerance, ("gated_silu", dtype))
print("equal: gated_silu", flush=True)

# A vector of zeros has no direction: neither its unit vector nor its gradient may be NaN.
zeros = [torch.zeros(3, 1, 8), torch.ones(1, 8), torch.zeros(1, 8)]
assert all(torch.isfinite(x).all() for x in run(lambda *x: UnitVectors.apply(*x, True), zeros))
print("equal: zeros")
