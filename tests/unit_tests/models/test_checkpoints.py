"""Hugging Face checkpoints: golden parity through the command line, names both ways, and broken folders."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_kernels.delta_rule.reference import recurrent_delta_rule
from refine_titan.errors import UserError
from refine_titan.models.delta_rule import mixer as delta_rule_mixer
from refine_titan.models.loading import load_hf_model
from tests.here import run_here
from tools.check_parity import compute, errors, main


def run_check(*arguments) -> subprocess.CompletedProcess:
    return run_here(lambda: main([*map(str, arguments)]), *arguments)


# Decays of flash-linear-attention's GatedDeltaNet: its kernel forms their gradient as a difference of sums of order one, which
# float32 leaves uncertain by 1e-7 a token. In this file that is 2.5e-4 of the largest; float64 and float32 of ours agree (below).
GRADIENT_BOUNDS = {
    "delta_net": {},
    "gated_delta_net": {"attn.A_log": 4e-4, "attn.dt_bias": 4e-4},
    "lact_muon_nope": {},
    "lact_sgd_rope": {},
    "qwen3_5_text": {},
    "qwen3_5": {},
    "olmo_hybrid": {},
}


@pytest.mark.parametrize("name", GRADIENT_BOUNDS)
def test_parity_with_golden_models(oracles, name):
    folder = oracles / name
    result = run_check(folder, folder / "expected.safetensors")
    report = json.loads(result.stdout)
    expected = load_file(folder / "expected.safetensors")
    assert {n for n in report if n.startswith("grad.")} == {n for n in expected if n.startswith("grad.")}
    for tensor, error in report.items():
        if tensor.startswith("grad."):
            bound = next((b for end, b in GRADIENT_BOUNDS[name].items() if tensor.endswith(end)), 1e-4)
            assert error < bound, tensor
        elif tensor not in ("worst", "ok"):
            assert error < 1e-5, tensor
    assert report["ok"] == (report["worst"] < 1e-4) and result.returncode == (0 if report["ok"] else 1)


def test_gradients_of_strong_decays_are_those_of_the_definition(oracles, monkeypatch):
    """Where the golden gradients of GatedDeltaNet are uncertain, ours in float32 are those of the definition, token by token,
    in float64; the golden ones are not."""
    folder = oracles / "gated_delta_net"
    expected = load_file(folder / "expected.safetensors")
    found = {}
    for dtype in (torch.float32, torch.float64):
        model, adapter = load_hf_model(folder, dtype)
        if dtype == torch.float64:
            monkeypatch.setattr(delta_rule_mixer, "delta_rule", recurrent_delta_rule)
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in expected.items()}
        found[dtype] = compute(model, adapter, inputs)
    reference = {n: x.detach() for n, x in found[torch.float64].items()}
    for name, error in errors(found[torch.float32], expected | reference).items():
        assert error < 1e-5, name
    golden = {n: x for n, x in expected.items() if n in reference}
    assert errors(golden, expected | reference)["grad.model.layers.1.attn.A_log"] > 1e-4


def test_parity_fails_on_other_weights(oracles, tmp_path):
    folder = oracles / "delta_net"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.attn.q_proj.weight"] *= 1.001
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    save_file(weights, tmp_path / "model.safetensors")
    result = run_check(tmp_path, folder / "expected.safetensors")
    assert result.returncode == 1 and not json.loads(result.stdout)["ok"]
    assert run_check(tmp_path, folder / "expected.safetensors", "--tolerance", "0.1").returncode == 0


def test_names_go_both_ways_bitwise(oracles):
    model, adapter = load_hf_model(oracles / "delta_net")
    back = adapter.to_hf(model.state_dict())
    original = load_file(oracles / "delta_net" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.fixture
def broken(oracles, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(oracles / "delta_net" / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: change_config(f, model_type="mamba"), "model_type is 'mamba'; known: delta_net"),
        (lambda f: change_config(f, qk_norm="l3"), "qk_norm is 'l3'; allowed: 'l2', 'sum'"),
        (lambda f: change_config(f, num_heads=3), r"hidden_size \* expand_k must be a whole multiple of num_heads \(3\), got 64"),
        (lambda f: change_config(f, attn={"layers": [1]}), "attn"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be read as safetensors"),
        (lambda f: change_weights(f, lambda w: w.pop("lm_head.weight")), "lack lm_head.weight"),
        (lambda f: change_weights(f, lambda w: w.update(extra=torch.ones(1))), "does not know: extra"),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(7)})),
            r"model.norm.weight has shape \[7\]",
        ),
    ],
)
def test_broken_folder_is_named(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message):
        load_hf_model(broken)


def test_command_line_names_missing_files(tmp_path):
    result = run_check(tmp_path / "nowhere", tmp_path / "nothing.safetensors")
    assert result.returncode == 2 and "does not exist" in result.stderr and "Traceback" not in result.stderr
