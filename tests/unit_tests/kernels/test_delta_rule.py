"""The chunked delta rule against its definition, and flash-linear-attention's kernels against the chunked form."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.delta_rule import delta_rule_step_
from refine_kernels.delta_rule.reference import chunked_delta_rule, recurrent_delta_rule
from tests.helpers import output_of_kernel_check, packings, positions, relative_rms

NAMES = ("q", "k", "v", "beta", "initial_state", "log_decay")
DECAYS = ("none", "per head", "per channel", "strong")


def make_inputs(num_tokens, num_sequences, H=2, K=6, V=5, dtype=torch.float64, seed=0, decay="none", groups=1):
    """Draws q, k, v, beta, initial state and log decay (None without decay)."""
    g = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(num_tokens, H // groups, K, generator=g, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(num_tokens, H, V, generator=g, dtype=dtype)
    beta = torch.rand(num_tokens, H, generator=g, dtype=dtype)
    initial = torch.randn(num_sequences, H, K, V, generator=g, dtype=dtype)
    shape = (num_tokens, H) if decay == "per head" else (num_tokens, H, K)
    log_decay = -(40 if decay == "strong" else 0.5) * torch.rand(shape, generator=g, dtype=dtype)
    return [None if x is None else x.requires_grad_() for x in (q, k, v, beta, initial, None if decay == "none" else log_decay)]


def run_with_gradients(operator, inputs, cu_seqlens, state_positions, use_initial=True):
    q, k, v, beta, initial, log_decay = inputs
    initial = initial if use_initial else None
    out, states = operator(q, k, v, beta, cu_seqlens, log_decay=log_decay, initial_state_NHKV=initial, state_positions=state_positions)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (out, states)]
    wanted = {name: x for name, x in zip(NAMES, (q, k, v, beta, initial, log_decay)) if x is not None}
    gradients = torch.autograd.grad((out * weights[0]).sum() + (states * weights[1]).sum(), list(wanted.values()))
    return out, states, dict(zip(wanted, gradients))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chunked_equals_definition_with_states_and_gradients(data):
    cu_seqlens = data.draw(packings())
    wanted = data.draw(positions(cu_seqlens))
    use_initial = data.draw(st.booleans())
    decay, groups = data.draw(st.sampled_from(DECAYS)), data.draw(st.sampled_from([1, 2]))
    inputs = make_inputs(cu_seqlens[-1], len(cu_seqlens) - 1, decay=decay, groups=groups)
    expected = run_with_gradients(recurrent_delta_rule, inputs, cu_seqlens, wanted, use_initial)
    found = run_with_gradients(chunked_delta_rule, inputs, cu_seqlens, wanted, use_initial)
    # float64 sums in another order
    assert relative_rms(found[0], expected[0]) < 1e-12
    assert relative_rms(found[1], expected[1]) < 1e-12
    for name, gradient in expected[2].items():
        assert relative_rms(found[2][name], gradient) < 1e-11, name


def test_no_positions_gives_no_states():
    inputs = make_inputs(70, 1)
    out, states = chunked_delta_rule(*inputs[:4], (0, 70))
    assert out.shape == (70, 2, 5) and states.shape == (0, 2, 6, 5)


def test_state_continues_the_sequence():
    q, k, v, beta, _, _ = make_inputs(200, 1)
    whole, _ = chunked_delta_rule(q, k, v, beta, (0, 200))
    for cut in (1, 63, 64, 100, 128, 199):
        _, state = chunked_delta_rule(*(x[:cut] for x in (q, k, v, beta)), (0, cut), state_positions=(cut,))
        rest, _ = chunked_delta_rule(*(x[cut:] for x in (q, k, v, beta)), (0, 200 - cut), initial_state_NHKV=state)
        assert relative_rms(rest, whole[cut:]) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("decay", ["none", "per head", "per channel", "strong"])
def test_steps_in_place_equal_the_definition(decay, groups):
    """Three sequences of 5 tokens each, in steps of 1, 3 and 1 tokens."""
    q, k, v, beta, initial, log_decay = (None if x is None else x.detach() for x in make_inputs(15, 3, decay=decay, groups=groups))
    arguments = dict(log_decay=log_decay, initial_state_NHKV=initial, state_positions=(5, 10, 15))
    expected, expected_states = recurrent_delta_rule(q, k, v, beta, (0, 5, 10, 15), **arguments)
    states = initial.clone()
    address = states.data_ptr()
    inputs = [None if x is None else x.unflatten(0, (3, 5)) for x in (q, k, v, beta, log_decay)]
    outputs = []
    for begin, end in ((0, 1), (1, 4), (4, 5)):
        outputs.append(delta_rule_step_(states, *(None if x is None else x[:, begin:end] for x in inputs)))
    assert relative_rms(torch.cat(outputs, 1).flatten(0, 1), expected) < 1e-12
    assert relative_rms(states, expected_states) < 1e-12 and states.data_ptr() == address


def test_autocast_does_not_lower_the_precision_of_a_step():
    q, k, v, beta, initial, _ = (None if x is None else x.detach() for x in make_inputs(3, 3, dtype=torch.float32))
    inputs = [x[:, None].bfloat16() for x in (q, k, v, beta)]
    plain, cast = initial.clone(), initial.clone()
    expected = delta_rule_step_(plain, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = delta_rule_step_(cast, *inputs)
    assert torch.equal(found, expected) and torch.equal(cast, plain) and found.dtype == torch.bfloat16


def test_bfloat16_inputs_keep_float32_states():
    inputs = [x.detach() for x in make_inputs(130, 1, dtype=torch.float32)[:4]]
    exact, exact_states = chunked_delta_rule(*inputs[:4], (0, 130), state_positions=(130,))
    out, states = chunked_delta_rule(*(x.bfloat16() for x in inputs[:4]), (0, 130), state_positions=(130,))
    assert out.dtype == torch.bfloat16 and states.dtype == torch.float32
    # bfloat16 has 8 bits: inputs are off by up to 2^-9 each
    assert relative_rms(out.float(), exact) < 2e-2 and relative_rms(states, exact_states) < 2e-2


def test_autocast_does_not_lower_the_precision():
    inputs = [x.detach().bfloat16() for x in make_inputs(130, 1, dtype=torch.float32)[:4]]
    plain = chunked_delta_rule(*inputs, (0, 130), state_positions=(100,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_delta_rule(*inputs, (0, 130), state_positions=(100,))
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("cu_seqlens", [(0,), (0, 5), (1, 10), (0, 4, 4, 10), (0, 11)])
def test_wrong_packing_is_refused(cu_seqlens):
    inputs = make_inputs(10, 1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunked_delta_rule(*inputs[:4], cu_seqlens)


@pytest.mark.parametrize("position", [0, 11])
def test_position_outside_is_refused(position):
    inputs = make_inputs(10, 1)
    with pytest.raises(ValueError, match="state positions"):
        chunked_delta_rule(*inputs[:4], (0, 10), state_positions=(position,))


def test_flash_linear_attention_path_equals_reference_in_the_interpreter():
    assert "all equal" in output_of_kernel_check("fla_interpreter_check")


SHARED_MEMORY = 227 * 1024  # bytes that a program may use on H100, H200 and B200


@pytest.mark.slow
@pytest.mark.parametrize("channels", [("128", "128"), ("256", "512")])  # DeltaNet-1.3B and GatedDeltaNet-1.3B
def test_kernels_compile_without_a_gpu_and_without_spills(channels):
    tool = Path(__file__).parents[3] / "kernels" / "benchmarks" / "compile_kernels.py"
    sizes = ("--key-channels", channels[0], "--value-channels", channels[1])
    result = subprocess.run([sys.executable, tool, *sizes], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    for row in rows:
        row["kind"] = row["kernel"], row["sm"], row.get("gated", row.get("decay"))
    found = {row["kind"] for row in rows}
    scans = itertools.product(("states", "gradients"), (90, 100), (False, True))
    both_ways = [
        name + way
        for name in ("convolution", "unit vectors", "writing factors", "hidden activations", "rescaled rows")
        for way in ("", ", gradients")
    ]
    others = itertools.product(("rotation", "convolution, step", *both_ways), (90, 100), (None,))
    steps = itertools.product(("step",), (90, 100), ("none", "per head", "per channel"))
    assert found == {*scans, *others, *steps}
    # The autotuner chooses among the configurations; at least one of every kernel must not spill.
    for kind in found:
        own = [row for row in rows if row["kind"] == kind]
        assert any(row["spilled_bytes"] == 0 and row["shared_bytes"] <= SHARED_MEMORY for row in own), kind
