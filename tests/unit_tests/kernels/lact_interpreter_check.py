"""Compares LaCT's Triton kernels with plain torch, forward and gradients, on a CPU. A script that tests run."""

import tests.fla_interpreter  # noqa: F401  isort: skip  before triton compiles anything

from functools import partial
from itertools import product

import torch
from fla.modules.activations import swiglu

from refine_kernels.gated_silu import gated_silu
from refine_kernels.lact import elementwise_kernels
from refine_kernels.lact.elementwise import added_and_rescaled, hidden, rescaled, unit_vectors, writing_factors
from refine_kernels.lact.elementwise_kernels import UnitVectors
from tests.helpers import relative_rms

# Fills the memory that kernels write to with NaN beforehand.
torch.use_deterministic_algorithms(True)

UNIT_CASES = [(1, 1, 4, True), (130, 2, 16, True), (257, 3, 40, False), (300, 1, 384, True)]  # tokens, heads, channels, SiLU
FACTOR_CASES = [(1, 1, 1, 3), (2, 3, 17, 24), (1, 2, 65, 384)]  # sequences, heads, tokens, hidden channels
# Sequences, sequences that have weights of their own, heads, rows, channels.
RESCALE_CASES = [(1, 1, 1, 5, 3), (3, 1, 2, 7, 40), (2, 2, 1, 9, 384)]


def run(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, weights_of(out))
    return [*(x.detach() for x in out), *(x.grad for x in leaves)]


def run_kernels(forward, backward, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same of a kernel and the kernel of its gradients."""
    out = forward(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    found = backward(*inputs, *weights_of(out))
    return [*out, *(found if isinstance(found, tuple) else (found,))]


def weights_of(out: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in out]


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
    for sequences, heads, tokens, channels in FACTOR_CASES:
        draw = torch.Generator().manual_seed(0)
        shape = (sequences, heads, tokens)
        inputs = [torch.randn(*shape, width * channels, generator=draw).to(dtype) for width in (2, 1)]
        inputs.append(torch.rand(*shape, 3, generator=draw, dtype=torch.promote_types(dtype, torch.float32)))
        found = run_kernels(elementwise_kernels.writing_factors, elementwise_kernels.writing_factors_gradient, inputs)
        compare(found, run(writing_factors, inputs), tolerance, (dtype, shape, channels))
        found = run_kernels(elementwise_kernels.hidden, elementwise_kernels.hidden_gradient, inputs[:1])
        compare(found, run(hidden, inputs[:1]), tolerance, (dtype, shape, channels))
    print("equal:", dtype, flush=True)

# The weights are at least float32, an update comes as it is.
for dtype, change_dtype, tolerance in (
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-2),
):
    for sequences, own, heads, rows, channels in RESCALE_CASES:
        draw = torch.Generator().manual_seed(0)
        weights = torch.randn(own, heads, rows, channels, generator=draw, dtype=dtype)
        change = torch.randn(sequences, heads, rows, channels, generator=draw).to(change_dtype)
        lengths = torch.rand(1, heads, rows, 1, generator=draw, dtype=dtype)
        for keep, read_dtype in product(("sum", "rescaled"), {dtype, change_dtype}):
            case = dtype, change_dtype, sequences, keep, read_dtype
            expected = run(partial(added_and_rescaled, keep=keep, read_dtype=read_dtype), [weights, change, lengths])
            dtypes = sorted({dtype, read_dtype} if keep == "rescaled" else {read_dtype}, key=lambda x: -x.itemsize)
            total, *read = elementwise_kernels.added_and_rescaled(weights, change, lengths, dtypes)
            out = (total if keep == "sum" else read[0], read[-1])
            grad_kept, grad_read = weights_of(out)
            grads = (grad_kept, [grad_read]) if keep == "sum" else (None, [grad_kept, grad_read])
            found = elementwise_kernels.rescaled_gradient(total, lengths, *grads, change_dtype)
            found = [x.sum(0, keepdim=True) if x.shape[0] > like.shape[0] else x for x, like in zip(found, expected[2:])]
            compare([*out, *found], expected, tolerance, case)
        _, read = elementwise_kernels.added_and_rescaled(weights, None, lengths, [dtype])
        expected = run(rescaled, [weights, lengths])
        grad_weights, _, grad_lengths = elementwise_kernels.rescaled_gradient(weights, lengths, None, weights_of((read,)), None)
        compare([read, grad_weights, grad_lengths.sum(0, keepdim=True)], expected, tolerance, (dtype, sequences))
    print("equal: rows,", dtype, change_dtype, flush=True)

# flash-linear-attention's kernel, in the dtype of training and in float32.
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    inputs = [torch.randn(3, 2, 17, 40, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1)]
    compare(run(swiglu, inputs), run(gated_silu, inputs), tolerance, ("gated_silu", dtype))
print("equal: gated_silu", flush=True)

# A vector of zeros has no direction: neither its unit vector nor its gradient may be NaN.
zeros = [torch.zeros(3, 1, 8), torch.ones(1, 8), torch.zeros(1, 8)]
assert all(torch.isfinite(x).all() for x in run(lambda *x: UnitVectors.apply(*x, True), zeros))
print("equal: zeros")
