"""Hugging Face to DCP and back keeps every bit and every file of every family, and the library's own class loads the result."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from refine_titan.models.loading import load_hf_model
from refine_titan.models.model_config import empty_state_dict
from refine_titan.models.stored_tensors import same_bits
from tests.checkpoints import (
    assert_nothing_left,
    assert_same_bits,
    convert,
    convert_here,
    export,
    random_bits,
    random_weights,
    read_hf_folder,
    write_hf_folder,
)
from tests.helpers import output_of_check

NO_TOKENIZER = "the checkpoint has no tokenizer, so that the folder has none; --tokenizer names one"
TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "generation_config.json": "{}"}


def tiny(family: str, **sizes):
    return replace(FAMILIES[family].flavors["debug"], **({"n_layers": 1, "vocab_size": 24} | sizes))


def read_dcp(folder, args) -> dict[str, torch.Tensor]:
    """Reads the model's entries as torchtitan does: all of the state dict, in float32."""
    state = {name: torch.empty(t.shape) for name, t in empty_state_dict(args).items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 2),
    vocab=st.integers(1, 40),
    is_tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_shards=st.integers(0, 5),
    max_shard_bytes=st.sampled_from([1, 100_000, 1_000_000, 10**9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_bitwise_however_sharded(tmp_path_factory, family, layers, vocab, is_tied, dtype, num_shards, max_shard_bytes, seed):
    folder = tmp_path_factory.mktemp("round_trip")
    args = tiny(family, n_layers=layers, vocab_size=vocab, tie_word_embeddings=is_tied)
    weights = random_bits(args, dtype, seed)
    draw = random.Random(seed)
    write_hf_folder(folder / "hf", args, weights, (lambda name: draw.randrange(num_shards)) if num_shards else None)
    from_hf(folder / "hf", folder / "dcp")
    to_hf(folder / "dcp", folder / "back", max_shard_bytes=max_shard_bytes)
    assert_same_bits(read_hf_folder(folder / "back"), weights)
    assert (folder / "back" / "config.json").read_bytes() == (folder / "hf" / "config.json").read_bytes()
    loaded = read_dcp(folder / "dcp", args)
    if is_tied:
        assert same_bits(loaded["output.weight"], loaded["tok_embeddings.weight"])
    for file in (folder / "back").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert file.stat().st_size < max_shard_bytes + 20_000 or len(opened.keys()) == 1


def test_command_line_converts_both_ways_with_all_files(tmp_path):
    args = tiny("delta_net")
    weights = random_weights(args, torch.bfloat16)
    hf = write_hf_folder(tmp_path / "hf", args, weights, lambda name: len(name) % 3, dtype="bfloat16")
    for name, text in TOKENIZER.items():
        (hf / name).write_text(text)
    (hf / "training_args.bin").write_text("not of interest")
    result = convert("from-hf", hf, tmp_path / "new" / "dcp")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    result = convert_here("inspect", tmp_path / "new" / "dcp")
    assert result.returncode == 0 and "DCP checkpoint, delta_net\n" in result.stdout and "bfloat16" in result.stdout
    result = convert("to-hf", tmp_path / "new" / "dcp", tmp_path / "back", "--max-shard-size", "200KB")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert_same_bits(read_hf_folder(tmp_path / "back"), weights)
    for name in ("config.json", *TOKENIZER):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "back" / "training_args.bin").exists()
    result = convert_here("inspect", tmp_path / "back")
    assert result.returncode == 0 and f"{sum(w.numel() for w in weights.values()):,} parameters" in result.stdout
    assert_nothing_left(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["delta_net", "qwen3_5_text", "qwen3_5", "olmo_hybrid"])
def test_golden_checkpoint_round_trips(oracles, tmp_path, name):
    """Of `qwen3_5` with its vision tower."""
    from_hf(oracles / name, tmp_path / "dcp")
    to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(
        path.name for path in (oracles / name).iterdir() if path.name != "expected.safetensors"
    )
    assert_same_bits(read_hf_folder(tmp_path / "hf"), read_hf_folder(oracles / name))
    assert (tmp_path / "hf" / "config.json").read_bytes() == (oracles / name / "config.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_library_loads_the_export(tmp_path, family, is_tied):
    import fla.models

    args = tiny(family, tie_word_embeddings=is_tied)
    library_class = getattr(fla.models, args.hf_format.architecture, None)
    if library_class is None:
        pytest.skip(f"flash-linear-attention has no {args.hf_format.architecture}")
    weights = random_weights(args)
    folder = export(tmp_path, args, weights, max_shard_bytes=500_000)
    model, report = library_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = model.state_dict()
    if is_tied:
        assert same_bits(state.pop("lm_head.weight"), state["model.embeddings.weight"])
    assert_same_bits(state, weights)


@pytest.mark.parametrize("arguments", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["plain", "every option"])
def test_library_gives_the_same_logits_from_the_export(arguments):
    """Runs fla's own classes in Triton's interpreter, in a process of its own: the interpreter is switched on before imports."""
    script = Path(__file__).with_name("fla_logits_check.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all equal" in result.stdout


def test_transformers_loads_the_export_with_equal_logits():
    """Runs transformers' own classes, in a process of its own: flash-linear-attention is hidden from it before import."""
    assert "all equal" in output_of_check("conversion", "transformers_logits_check")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["fla", "transformers"])
def test_auto_classes_load_the_export(library):
    """In a process of its own, with the imports that README.md says."""
    assert "all equal" in output_of_check("conversion", "auto_model_check", library)


def test_bfloat16_checkpoint_loads_into_float32_parameters(tmp_path):
    args = tiny("delta_net")
    weights = random_weights(args, torch.bfloat16)
    from_hf(write_hf_folder(tmp_path / "hf", args, weights), tmp_path / "dcp")
    model, adapter = load_hf_model(tmp_path / "hf")
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    loaded = adapter.to_hf(read_dcp(tmp_path / "dcp", args))
    assert_same_bits(loaded, {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize(
    "stated, asked, expected",
    [
        ({"dtype": "float32"}, torch.bfloat16, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, torch.bfloat16, {"torch_dtype": "bfloat16"}),
        ({}, torch.float16, {"dtype": "float16"}),
        ({"dtype": None}, torch.bfloat16, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, None, {"torch_dtype": "float32"}),
    ],
)
def test_dtype_is_cast_and_stated(tmp_path, stated, asked, expected):
    args = tiny("delta_net")
    weights = random_weights(args)
    from_hf(write_hf_folder(tmp_path / "hf", args, weights, **stated), tmp_path / "dcp")
    assert to_hf(tmp_path / "dcp", tmp_path / "back", dtype=asked) == [NO_TOKENIZER]
    assert_same_bits(read_hf_folder(tmp_path / "back"), {n: w.to(asked or torch.float32) for n, w in weights.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == args.to_hf_config() | expected


def test_parameters_that_a_family_keeps_in_float32_are_not_cast(tmp_path):
    args = tiny("gated_delta_net")
    back = read_hf_folder(export(tmp_path, args, random_weights(args), dtype=torch.bfloat16))
    kept = {name for name, tensor in back.items() if tensor.dtype == torch.float32}
    assert kept == {"model.layers.0.attn.A_log", "model.layers.0.attn.dt_bias"}


def test_values_too_large_for_a_dtype_are_reported(tmp_path):
    args = tiny("delta_net")
    weights = random_weights(args)
    weights["model.norm.weight"][0] = 1e30
    from_hf(write_hf_folder(tmp_path / "hf", args, weights), tmp_path / "dcp")
    notes = to_hf(tmp_path / "dcp", tmp_path / "back", dtype=torch.float16)
    assert notes == ["values too large for the new dtype became infinite in model.norm.weight", NO_TOKENIZER]


def test_output_inside_the_source_is_refused(tmp_path):
    args = tiny("delta_net")
    hf = write_hf_folder(tmp_path / "hf", args, random_weights(args))
    with pytest.raises(UserError, match="lies inside .*hf, which is only read"):
        from_hf(hf, hf / "dcp")
    from_hf(hf, tmp_path / "dcp")
    with pytest.raises(UserError, match="lies inside .*dcp, which is only read"):
        to_hf(tmp_path / "dcp", tmp_path / "dcp" / "out")
    assert not (hf / "dcp").exists() and not (tmp_path / "dcp" / "out").exists()


def test_note_if_the_config_states_another_dtype(tmp_path):
    args = tiny("delta_net")
    from_hf(write_hf_folder(tmp_path / "hf", args, random_weights(args), dtype="bfloat16"), tmp_path / "dcp")
    missing, note = to_hf(tmp_path / "dcp", tmp_path / "back")
    assert missing == NO_TOKENIZER and "the weights are float32, but config.json says bfloat16" in note


def test_tied_head_stored_twice_is_accepted_if_it_is_the_same(tmp_path):
    args = tiny("delta_net", tie_word_embeddings=True)
    weights = random_bits(args)
    twice = weights | {"lm_head.weight": weights["model.embeddings.weight"].clone()}
    from_hf(write_hf_folder(tmp_path / "hf", args, twice), tmp_path / "dcp")
    to_hf(tmp_path / "dcp", tmp_path / "back")
    assert_same_bits(read_hf_folder(tmp_path / "back"), weights)


def test_config_option_replaces_a_missing_config(tmp_path):
    args = tiny("delta_net")
    weights = random_weights(args)
    hf = write_hf_folder(tmp_path / "hf", args, weights)
    (hf / "tokenizer.json").write_text("{}")
    from_hf(hf, tmp_path / "dcp")
    (tmp_path / "dcp" / "config.json").unlink()
    (tmp_path / "dcp" / "tokenizer.json").unlink()
    result = convert_here("to-hf", tmp_path / "dcp", tmp_path / "back")
    assert result.returncode == 1 and "has no config.json; name the model's with --config" in result.stderr
    assert_nothing_left(tmp_path / "back")
    to_hf(tmp_path / "dcp", tmp_path / "back", config_path=hf / "config.json")
    assert_same_bits(read_hf_folder(tmp_path / "back"), weights)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
