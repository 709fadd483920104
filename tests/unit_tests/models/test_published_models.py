"""Models as people published them: configurations of other programs and years, tensors that no code reads, early layouts, strong decays."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.inspection import inspect
from refine_titan.conversion.to_hf import to_hf
from refine_titan.dry_run import dry_run
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from refine_titan.models.delta_rule.mixer import DecayGate
from refine_titan.models.gated_delta_net import GatedDeltaNetArgs
from refine_titan.models.gated_delta_product import GatedDeltaProductArgs
from refine_titan.models.lact import LaCTArgs
from refine_titan.models.loading import load_hf_model
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.registration import register_models
from refine_titan.validation import gpu_limit, load_config
from tests.checkpoints import random_weights, write_hf_folder
from tests.helpers import relative_rms

# Every key of LaCT's published 760M configuration.
LACT_760M = dict(
    attention_bias=False,
    attn_qk_norm=False,
    bos_token_id=1,
    eos_token_id=2,
    fuse_cross_entropy=True,
    fuse_norm=True,
    fw_init_gain=0.5,
    hidden_act="swish",
    hidden_size=1536,
    initializer_range=0.02,
    inter_multi=1,
    lact_chunk_size=2048,
    learnable_ttt_scale=True,
    lr_dim=1,
    lr_parameterization="mamba",
    max_position_embeddings=32768,
    model_type="lact_swiglu",
    norm_eps=1e-06,
    num_attn_heads=24,
    num_hidden_layers=24,
    num_lact_heads=4,
    qkv_bias=False,
    qkv_silu=True,
    rope_theta=1000000,
    tie_word_embeddings=False,
    use_cache=True,
    use_momentum=True,
    use_muon=False,
    vocab_size=32000,
    w0_w2_low_rank=32,
    window_size=2048,
)


@pytest.mark.parametrize("flavor, changes", [("760M", {}), ("760M_muon", {"use_muon": True})])
def test_presets_of_lact_are_the_published_configurations(flavor, changes):
    assert LaCTArgs.from_hf_config(LACT_760M | changes) == FAMILIES["lact"].flavors[flavor]


def test_published_lact_with_the_fused_kernel_is_accepted_and_keys_with_an_effect_are_not_ignored():
    args = LaCTArgs.from_hf_config(LACT_760M | {"no_v_silu": True, "use_fused_kernel": True, "fp32_states": True})
    assert args.no_v_silu and args.use_fused_kernel
    for key, value in {"attention_bias": True, "lr_parameterization": "exp", "ttt_loss_type": "l2", "hidden_act": "gelu"}.items():
        with pytest.raises(ValueError, match=f"{key} is {value!r}; allowed: "):
            LaCTArgs.from_hf_config(LACT_760M | {key: value})
    with pytest.raises(ValueError, match="made_up = 1 is not a setting"):
        LaCTArgs.from_hf_config(LACT_760M | {"made_up": 1})


@pytest.mark.parametrize("head_dim, expand_v, value_dim", [(100, 1.1, 110), (10, 0.7, 7), (30, 2.3, 69)])
def test_products_of_floats_are_whole_numbers(head_dim, expand_v, value_dim):
    config = GatedDeltaNetArgs(head_dim=2).to_hf_config() | {"head_dim": head_dim, "expand_v": expand_v}
    assert GatedDeltaNetArgs.from_hf_config(config).head_v_dim == value_dim
    with pytest.raises(ValueError, match=r"head_dim \* expand_v must be a whole number, got 110.5"):
        GatedDeltaNetArgs.from_hf_config(config | {"head_dim": 100, "expand_v": 1.105})


def test_a_float_product_below_a_whole_number_is_refused_as_by_the_library():
    config = GatedDeltaNetArgs(head_dim=2).to_hf_config() | {"head_dim": 100, "expand_v": 0.29}
    with pytest.raises(ValueError, match="must be a whole number, got 28.999999999999996"):
        GatedDeltaNetArgs.from_hf_config(config)


WIDE = {
    "gated_delta_net": {"head_dim": 512},
    "kda": {"head_dim": 512},
    "delta_net": {"n_heads": 1, "dim": 512},
    "qwen3_5": {"head_dim": 512},
}


@pytest.mark.parametrize("family", WIDE)
def test_heads_that_gpu_kernels_do_not_take(family):
    args = replace(FAMILIES[family].flavors["debug"], **WIDE[family])
    assert gpu_limit(args) == "a head has 512 key channels; allowed on a GPU: at most 256, by flash-linear-attention's kernels"
    assert gpu_limit(FAMILIES[family].flavors["debug"]) is None and gpu_limit(FAMILIES["lact"].flavors["3B"]) is None


def test_dry_run_and_a_run_on_a_gpu_say_so(tmp_path, monkeypatch):
    register_models()
    args = replace(FAMILIES["gated_delta_net"].flavors["debug"], head_dim=512, n_heads=1, n_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(args.to_hf_config()))
    settings = ["--model.name=gated_delta_net", f"--model.flavor={tmp_path}", f"--job.dump_folder={tmp_path / 'run'}"]
    assert "on a GPU:   not possible: a head has 512 key channels" in dry_run(load_config(settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"model.flavor is '.*': a head has 512 key channels; allowed on a GPU: at most 256"):
        load_config(settings)


@pytest.fixture
def golden(oracles, tmp_path):
    """A copy of GatedDeltaNet's golden model, and its weights."""
    folder = tmp_path / "golden"
    folder.mkdir()
    shutil.copy(oracles / "gated_delta_net" / "config.json", folder / "config.json")
    return folder, load_file(oracles / "gated_delta_net" / "model.safetensors")


def test_tensors_that_the_library_stopped_reading_are_named_and_left_out(golden, tmp_path):
    folder, weights = golden
    unread = {f"model.layers.{i}.attn.D": torch.ones(2) for i in range(2)}
    save_file(weights | unread, folder / "model.safetensors")
    notes = from_hf(folder, tmp_path / "dcp")
    assert len(notes) == 1 and notes[0].startswith("model.layers.0.attn.D and 1 more of its kind: written by an earlier version")
    to_hf(tmp_path / "dcp", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    load_hf_model(folder)
    for name in ("model.layers.9.attn.D", "model.layers.0.mlp.D", "model.layers.0.attn.E"):
        save_file(weights | {name: torch.ones(2)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"a tensor this model does not know: {name}"):
            load_hf_model(folder)


def early(weights):
    """The layout of flash-linear-attention's MLPs until early 2025."""
    found = {name: x for name, x in weights.items() if ".mlp.up_proj." not in name}
    for name in [name for name in found if ".mlp.gate_proj." in name]:
        found[name] = torch.cat([found[name], weights[name.replace("gate_proj", "up_proj")]])
    return found


@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact"])
def test_early_layout_of_gate_and_up_projection(family, tmp_path):
    args = replace(FAMILIES[family].flavors["debug"], n_layers=2)
    weights = random_weights(args)
    folder = write_hf_folder(tmp_path / "early", args, early(weights))
    today = write_hf_folder(tmp_path / "today", args, weights)
    (a, _), (b, _) = load_hf_model(folder), load_hf_model(today)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert from_hf(folder, tmp_path / "dcp") == []
    to_hf(tmp_path / "dcp", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match="gate and up projections in one tensor.*from-hf"):
        load_config([f"--model.name={family}", f"--model.flavor={folder}", "--checkpoint.enable", *starts_from(folder)])


def starts_from(folder):
    return [f"--checkpoint.initial_load_path={folder}", "--checkpoint.initial_load_in_hf"]


def test_a_gate_of_another_size_is_no_early_layout(tmp_path):
    args = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1)
    weights = early(random_weights(args))
    name = next(name for name in weights if ".mlp.gate_proj." in name)
    folder = write_hf_folder(tmp_path / "odd", args, weights | {name: weights[name][:-1].clone()})
    with pytest.raises(UserError, match="the weights lack model.layers.0.mlp.up_proj.weight"):
        load_hf_model(folder)


def test_gated_delta_product_with_the_earlier_key(tmp_path):
    args = replace(FAMILIES["gated_delta_product"].flavors["debug"], n_layers=1, use_output_gate=False)
    config = args.to_hf_config()
    earlier = {key: value for key, value in config.items() if key != "use_output_gate"} | {"use_gate": False}
    assert GatedDeltaProductArgs.from_hf_config(earlier) == args
    assert GatedDeltaProductArgs.from_hf_config(config | {"use_gate": False}) == args
    with pytest.raises(ValueError, match="use_gate is True and use_output_gate, its name of today, False"):
        GatedDeltaProductArgs.from_hf_config(config | {"use_gate": True})
    folder = write_hf_folder(tmp_path / "hf", args, random_weights(args))
    (folder / "config.json").write_text(json.dumps(earlier))
    from_hf(folder, tmp_path / "dcp")
    to_hf(tmp_path / "dcp", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["use_output_gate"] is False and "use_gate" not in written
    assert inspect(tmp_path / "back").problems == []


@pytest.mark.parametrize("A_log", [6.0, 30.0, 90.0, 500.0])
def test_strong_decays_forget_the_state_at_once(golden, A_log):
    """In float32, against float64, whose decays end later, and against a state that is forgotten."""
    folder, weights = golden
    weights["model.layers.0.attn.A_log"] = torch.full_like(weights["model.layers.0.attn.A_log"], A_log)
    save_file(weights, folder / "model.safetensors")
    (narrow, _), (wide, _) = load_hf_model(folder), load_hf_model(folder, torch.float64)
    tokens = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(0))
    layout = SharedPrefixLayout((0, 90, 200), state_positions=(90, 130, 200))
    outs = [model(tokens, layout, labels=tokens.roll(-1)) for model in (narrow, wide)]
    assert relative_rms(outs[0].hidden_TD.double(), outs[1].hidden_TD) < 1e-5
    for a, b in zip(outs[0].states, outs[1].states):
        assert relative_rms(a["recurrent"].double(), b["recurrent"]) < 1e-5
    for model, out in zip((narrow, wide), outs):
        out.losses.nll_sum.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_decay_gates_are_finite_whatever_their_parameters(lower_bound):
    gate = DecayGate(2, lower_bound=lower_bound)
    with torch.no_grad():
        gate.A_log.copy_(torch.tensor([1000.0, -1000.0]))
        gate.dt_bias.copy_(torch.tensor([-1e4, 1e4]))
    x = torch.tensor([[-1e5, 1e5], [0.0, 0.0], [1e4, -1e4], [1e30, -1e30]], requires_grad=True)
    log_decay = gate(x)
    log_decay.sum().backward()
    assert log_decay.isfinite().all() and (log_decay <= 0).all() and log_decay.min() >= -32
    assert x.grad.isfinite().all() and gate.A_log.grad.isfinite().all() and gate.dt_bias.grad.isfinite().all()
