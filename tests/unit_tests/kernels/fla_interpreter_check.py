"""Compares the delta rule's GPU path with the reference, forward and gradients, on a CPU. A script that tests run."""

import tests.fla_interpreter  # noqa: F401  isort: skip  before fla is imported

import torch
from fla.modules.norm.l2norm import l2norm

import refine_kernels.delta_rule.flash_linear_attention as fla_path
from refine_kernels.delta_rule import delta_rule_step_
from refine_kernels.delta_rule.reference import chunked_delta_rule
from refine_kernels.delta_rule.step_kernel import run_step
from refine_kernels.l2_norm import EPS, l2_normalise
from tests.helpers import relative_rms
from tests.unit_tests.kernels.test_delta_rule import make_inputs, run_with_gradients

# Fills the memory that kernels write to with NaN beforehand.
torch.use_deterministic_algorithms(True)

CASES = [
    # cu_seqlens, state positions, with an initial state, decay, value heads per key head
    ((0, 100), (), False, "none", 1),
    ((0, 200), (1, 64, 130, 130, 200), False, "none", 2),
    ((0, 90, 170), (91, 90, 155), True, "none", 1),
    ((0, 1, 2, 3), (1, 2, 3), True, "none", 1),  # a decoding step: one token per sequence
    ((0, 300), (64, 128, 256, 128), True, "none", 1),
    ((0, 70, 340), (64, 70, 134, 140, 198, 330), False, "per head", 2),
    ((0, 100), (1, 65), False, "per head", 1),
    ((0, 90, 170), (91, 155), True, "per head", 2),
    ((0, 90, 100), (50,), True, "per channel", 1),
]

for cu_seqlens, positions, use_initial, decay, groups in CASES:
    size = dict(H=2, K=16, V=16, groups=groups, decay=decay)
    inputs = make_inputs(cu_seqlens[-1], len(cu_seqlens) - 1, dtype=torch.float32, **size)
    expected = run_with_gradients(chunked_delta_rule, inputs, cu_seqlens, positions, use_initial)
    found = run_with_gradients(fla_path.segmented_delta_rule, inputs, cu_seqlens, positions, use_initial)
    # fla keeps some intermediates in lower precision than float32; matrix products are float32 in the interpreter.
    for name, a, b in [("out", found[0], expected[0]), ("states", found[1], expected[1])]:
        assert relative_rms(a, b) < 1e-5, (cu_seqlens, name, relative_rms(a, b))
    for name, gradient in expected[2].items():
        error = relative_rms(found[2][name], gradient)
        assert error < 1e-4, (cu_seqlens, name, error)
    print("equal:", cu_seqlens, positions, decay, flush=True)

for decay in ("none", "per head", "per channel"):  # decoding without gradient, where the recurrent kernels run
    with torch.no_grad():
        q, k, v, beta, initial, log_decay = make_inputs(6, 3, H=2, K=16, V=16, dtype=torch.float32, decay=decay)
        arguments = dict(log_decay=log_decay, initial_state_NHKV=initial, state_positions=(1, 3, 6))
        expected = chunked_delta_rule(q, k, v, beta, (0, 1, 3, 6), **arguments)
        found = fla_path.segmented_delta_rule(q, k, v, beta, (0, 1, 3, 6), **arguments)
    for a, b in zip(found, expected):
        assert relative_rms(a, b) < 1e-5, (decay, relative_rms(a, b))
    print("equal: decoding", decay, flush=True)

for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for decay, groups, K, V in (("none", 1, 16, 16), ("per head", 2, 24, 40), ("per channel", 1, 8, 5), ("strong", 2, 16, 16)):
        size = dict(H=2, K=K, V=V, groups=groups, decay=decay)
        *inputs, initial, log_decay = (x if x is None else x.detach() for x in make_inputs(6, 2, dtype=dtype, **size))
        initial = initial.to(torch.promote_types(dtype, torch.float32))
        inputs = [None if x is None else x.unflatten(0, (2, 3)) for x in (*inputs, log_decay)]
        states = initial.clone(), initial.clone()
        for begin, end in ((0, 1), (1, 3)):
            part = [None if x is None else x[:, begin:end] for x in inputs]
            expected, found = delta_rule_step_(states[0], *part), run_step(states[1], *part)
            assert found.dtype == expected.dtype and relative_rms(found, expected) < tolerance, (dtype, decay)
        assert relative_rms(*states) < min(tolerance, 1e-5), (dtype, decay, relative_rms(*states))
    print("equal: step in place", dtype, flush=True)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    x, weights = (torch.randn(37, 2, 24, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    results = []
    for operator in (l2_normalise, lambda x: l2norm(x, eps=EPS)):
        leaf = x.clone().requires_grad_()
        y = operator(leaf)
        results.append((y.detach(), *torch.autograd.grad((y * weights).sum(), leaf)))
    for a, b in zip(*results):
        assert a.dtype == b.dtype and relative_rms(b, a) < tolerance, (dtype, relative_rms(b, a))
    print("equal: l2 norm", dtype, flush=True)
try:
    run_step(states[1].mT, *part)
    raise SystemExit("states that are not contiguous were accepted")
except ValueError as error:
    assert "contiguous" in str(error)

# Decays of about e^-8 per token: fla computes the gradient of a decay as a difference of terms of order one. The delta rule's
# README.md has the figures.
q, k, v, beta, _, log_decay = make_inputs(112, 1, H=2, K=32, V=32, dtype=torch.float64, decay="per head")
weights = torch.randn(112, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient_of_decay(operator, dtype):
    inputs = [x.detach().to(dtype) for x in (q, k, v, beta)]
    decay = (log_decay.detach() - 8).to(dtype).requires_grad_()
    out, _ = operator(*inputs, (0, 112), log_decay=decay)
    return torch.autograd.grad((out * weights.to(dtype)).sum(), decay)[0]


exact = gradient_of_decay(chunked_delta_rule, torch.float64)
ours = relative_rms(gradient_of_decay(chunked_delta_rule, torch.float32), exact)
theirs = relative_rms(gradient_of_decay(fla_path.segmented_delta_rule, torch.float32), exact)
print(f"gradient of strong decays, relative error: {ours:.1e}, fla {theirs:.1e}", flush=True)
assert ours < 1e-6 and theirs > 1e-3
print("all equal")
