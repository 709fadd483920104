"""LaCT's fast weights against their definition and against golden cases, and states at any position."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from refine_kernels.lact import FastWeights, LaCTState, fixed_states, lact
from refine_kernels.lact.newton_schulz import orthogonalise
from refine_kernels.lact.reference import lact_by_definition
from tests.helpers import output_of_kernel_check, packings, relative_rms


def make_inputs(num_tokens, H=2, D=6, M=6, L=1, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    q, k = (F.normalize(normal(num_tokens, H, D), dim=-1) for _ in range(2))
    lr = 0.3 * torch.rand(num_tokens, H, 3, L, generator=g, dtype=dtype)
    momentum = torch.rand(num_tokens, H, generator=g, dtype=dtype)
    weights = FastWeights(normal(H, M, D) / D**0.5, normal(H, D, M) / M**0.5, normal(H, M, D) / D**0.5)
    return [q, k, normal(num_tokens, H, D), lr, momentum, *weights]


def gradients(out, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True)


def assert_same_gradients(out, expected, inputs):
    found, wanted = gradients(out, inputs), gradients(expected, inputs)
    scale = sum(float(w.square().sum()) for w in wanted) ** 0.5
    for a, b in zip(found, wanted):
        assert float((a - b).norm()) <= 1e-6 * max(float(b.norm()), 1e-3 * scale)


def draw_options(data):
    muon = data.draw(st.booleans())
    # Muon amplifies rounding errors in directions of small singular values: with few tokens per chunk, or many chunks, results diverge.
    chunk_size = data.draw(st.sampled_from([16, 25, 200] if muon else [1, 7, 16, 200]))
    prenorm, joins = data.draw(st.booleans()), muon and data.draw(st.booleans())
    return dict(chunk_size=chunk_size, muon=muon, muon_joins=joins, prenorm=prenorm, newton_schulz_dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_sequences_equal_the_definition_with_gradients(data):
    cu_seqlens = data.draw(packings(max_documents=3, max_length=60))
    options = draw_options(data)
    M, L = data.draw(st.sampled_from([(6, 1), (9, 1), (4, 1), (6, 6)]))
    inputs = [x.requires_grad_() for x in make_inputs(cu_seqlens[-1], M=M, L=L)]
    q, k, v, lr, momentum, *weights = inputs
    momentum = momentum if data.draw(st.booleans()) else None
    weights = FastWeights(*weights)
    out, states = lact(q, k, v, lr, momentum, weights, cu_seqlens, **options)
    options["newton_schulz_dtype"] = torch.float64  # "at least float32" is float64 here
    expected = lact_by_definition(q, k, v, lr, momentum, weights, cu_seqlens, **options)
    assert states.version.shape == (0,) and states.weights[0].w0.shape == weights.w0.shape
    # Muon's iterations amplify rounding errors in directions in which an update is nearly singular.
    assert relative_rms(out, expected) < 1e-8
    assert_same_gradients(out, expected, inputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_states_continue_the_sequence_with_gradients(data):
    """A sequence continued from the state at any cut gives the rest of the outputs, and gradients flow through the cut."""
    options = draw_options(data)
    length, C = data.draw(st.integers(2, 60)), options["chunk_size"]
    cuts = sorted(data.draw(st.sets(st.one_of(st.integers(1, length - 1), st.just(min(C, length - 1))), min_size=1, max_size=4)))
    inputs = [x.requires_grad_() for x in make_inputs(length)]
    *tokens, w0, w1, w2 = inputs
    if not data.draw(st.booleans()):
        tokens[4] = None
    weights = FastWeights(w0, w1, w2)
    whole, _ = lact(*tokens, weights, (0, length), **options)

    last = cuts[-1]
    trunk, states = lact(*(None if x is None else x[:last] for x in tokens), weights, (0, last), state_positions=tuple(cuts), **options)
    rests, starts = [], [0]
    for cut in cuts:
        rests.append([None if x is None else x[cut:] for x in tokens])
        starts.append(starts[-1] + length - cut)
    packed = [None if x[0] is None else torch.cat(x) for x in zip(*rests)]
    if data.draw(st.booleans()):  # as an engine's memory pages keep them
        how = {name: value for name, value in options.items() if name in ("chunk_size", "prenorm")}
        states = LaCTState.of_fixed(cuts, fixed_states(states, weights, compute_dtype=torch.float64, **how), C)
    out, _ = lact(*packed, weights, tuple(starts), past=states, **options)
    expected = torch.cat([whole[cut:] for cut in cuts])
    assert relative_rms(trunk, whole[:last]) < 1e-8
    assert relative_rms(out, expected) < 1e-8
    assert_same_gradients(out, expected, inputs)


CASES = ("plain", "mom", "muon_mom", "pre_muon", "short")


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(oracles, case):
    tensors = load_file(oracles / "lact_op.safetensors")
    assert {name.split(".")[0] for name in tensors} == set(CASES)
    x = {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}
    chunk_size, muon, prenorm = x["meta_chunk_muon_prenorm"].tolist()
    names = [name for name in ("q", "k", "v", "lr0", "lr1", "lr2", "momentum", "w0", "w1", "w2") if name in x]
    for name in names:
        x[name].requires_grad_()
    B, T = x["q"].shape[:2]
    tokens = [x[name].transpose(0, 1) for name in ("q", "k", "v")]  # the golden cases count every head of the batch as a head
    lr = torch.stack([x[f"lr{i}"] for i in range(3)], 2).transpose(0, 1)
    momentum = x["momentum"].squeeze(-1).T if "momentum" in x else None
    out, _ = lact(
        *tokens,
        lr,
        momentum,
        FastWeights(x["w0"], x["w1"], x["w2"]),
        (0, T),
        chunk_size=chunk_size,
        muon=bool(muon),
        prenorm=bool(prenorm),
        newton_schulz_dtype=torch.float32,
    )
    assert relative_rms(out.transpose(0, 1), x["out"]) < 1e-5
    wanted = [name for name in names if f"grad_{name}" in x]
    found = torch.autograd.grad((out.transpose(0, 1) * x["grad_out"]).sum(), [x[name] for name in wanted], allow_unused=True)
    scale = sum(float(x[f"grad_{name}"].square().sum()) for name in wanted) ** 0.5
    for name, gradient in zip(wanted, found):
        expected = x[f"grad_{name}"]
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        assert float((gradient - expected).norm()) < 1e-4 * max(float(expected.norm()), 1e-3 * scale), name


def test_bfloat16_inputs_stay_near_float32():
    inputs = make_inputs(100, H=2, D=16, M=16, dtype=torch.float32)
    *tokens, w0, w1, w2 = inputs
    options = dict(chunk_size=32, muon=False, state_positions=(50, 100))
    exact, exact_states = lact(*tokens, FastWeights(w0, w1, w2), (0, 100), **options)
    low = [x.bfloat16() if i < 3 else x for i, x in enumerate(tokens)]
    out, states = lact(*low, FastWeights(w0, w1, w2), (0, 100), **options)
    fixed, exact_fixed = (
        fixed_states(x, FastWeights(w0, w1, w2), chunk_size=32, compute_dtype=dtype)
        for x, dtype in ((states, torch.bfloat16), (exact_states, torch.float32))
    )
    assert out.dtype == torch.bfloat16 and fixed.weights.w0.dtype == fixed.sums.w1.dtype == torch.float32
    # bfloat16 has 8 bits; a token passes through five products and two updates
    assert relative_rms(out.float(), exact) < 3e-2
    assert relative_rms(fixed.weights.w0, exact_fixed.weights.w0) < 2e-2
    assert relative_rms(fixed.sums.w1, exact_fixed.sums.w1) < 2e-2


def test_autocast_does_not_change_the_precision():
    *tokens, w0, w1, w2 = make_inputs(40, dtype=torch.float32)
    plain, _ = lact(*tokens, FastWeights(w0, w1, w2), (0, 40), chunk_size=16, muon=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = lact(*tokens, FastWeights(w0, w1, w2), (0, 40), chunk_size=16, muon=True)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalise(x, torch.float64))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.2


def test_kernels_equal_plain_torch_in_the_interpreter():
    assert output_of_kernel_check("lact_interpreter_check").count("equal:") == 8


def test_wrong_chunk_size_and_packing_are_refused():
    *tokens, w0, w1, w2 = make_inputs(10)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        lact(*tokens, FastWeights(w0, w1, w2), (0, 10), chunk_size=0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        lact(*tokens, FastWeights(w0, w1, w2), (0, 9), chunk_size=4)
