"""Sizes read from a `config.json`, starting weights of another model, and what a run's checkpoints say about it."""

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_titan.checkpointing import write_description_with_checkpoints
from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files
from refine_titan.conversion.description import ModelDescription
from refine_titan.conversion.from_hf import from_hf
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.inference import check_checkpoint
from refine_titan.models import FAMILIES
from refine_titan.models.sizes import Flavors, resolve_args, resolve_flavor
from refine_titan.starting_point import describe_run, refuse_unloaded_start
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder
from tests.hostile_checkpoints import remove_checksums


def small(family: str, **sizes):
    return replace(FAMILIES[family].flavors["debug"], **({"n_layers": 1, "vocab_size": 264} | sizes))


def hf_folder(folder, family="delta_net", **sizes):
    args = small(family, **sizes)
    return write_hf_folder(folder, args, random_weights(args))


def load(*overrides):
    return load_config([str(override) for override in overrides])


@pytest.mark.parametrize("family", FAMILIES)
def test_flavor_is_read_from_a_folder_or_a_file(tmp_path, family):
    args = small(family)
    folder = hf_folder(tmp_path / "1.3B-instruct", family)
    for flavor in (folder, folder / "config.json"):
        assert resolve_flavor(family, str(flavor)) == args
        assert Flavors(family)[str(flavor)] == args
        load("--model.name", family, "--model.flavor", flavor)
    assert Flavors(family)["debug"] == FAMILIES[family].flavors["debug"]


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "model.flavor: .*config.json does not exist"),
        ("{", "model.flavor: .*config.json is not JSON"),
        ({"model_type": "mamba"}, "model.flavor: .*config.json: model_type is 'mamba'; known: delta_net"),
        ({"model_type": "delta_net", "hidden_size": 64, "num_hidden_layers": 1, "flag": 1}, "flag = 1 is not a setting of delta_net"),
    ],
)
def test_flavor_that_cannot_be_read_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=message):
        load("--model.flavor", tmp_path)


def test_flavor_of_another_family_names_it(tmp_path, monkeypatch):
    delta_net = FAMILIES["delta_net"]

    class OtherArgs(delta_net.args_class):
        hf_format = replace(delta_net.args_class.hf_format, model_type="other_net")

    monkeypatch.setitem(FAMILIES, "other", replace(delta_net, args_class=OtherArgs))
    hf_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "other_net"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json is of the family 'other', but model.name is 'delta_net'"):
        load("--model.flavor", tmp_path)


def test_start_of_another_size_names_the_differences(tmp_path):
    hf = hf_folder(tmp_path / "hf", hidden_ratio=1)
    from_hf(hf, tmp_path / "dcp")
    load("--model.flavor", hf, "--checkpoint.initial_load_path", tmp_path / "dcp")
    load("--model.flavor", tmp_path / "dcp", "--checkpoint.initial_load_path", hf, "--checkpoint.initial_load_in_hf")
    expected = r"is not a delta_net debug: vocab_size 264 \(flavor: 288\), n_layers 1 \(flavor: 4\), intermediate_size 256 \(flavor: 512\)$"
    with pytest.raises(UserError, match="checkpoint.initial_load_path: .*dcp " + expected):
        load("--checkpoint.initial_load_path", tmp_path / "dcp")
    with pytest.raises(UserError, match="checkpoint.initial_load_in_hf: .*hf " + expected):
        load("--checkpoint.initial_load_path", hf, "--checkpoint.initial_load_in_hf")


def test_start_that_is_no_dcp_checkpoint_is_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    from_hf(hf, tmp_path / "dcp")
    start = ("--model.flavor", hf, "--checkpoint.initial_load_path")
    with pytest.raises(UserError, match="hf is not a complete DCP checkpoint .*needs checkpoint.initial_load_in_hf = true"):
        load(*start, hf)
    (tmp_path / "dcp" / "config.json").unlink()
    load(*start, tmp_path / "dcp")
    with pytest.raises(UserError, match="dcp: the weights lack layers.1.mixer_norm.weight"):
        load("--checkpoint.initial_load_path", tmp_path / "dcp")
    (tmp_path / "dcp" / "__0_1.distcp").unlink()
    with pytest.raises(UserError, match="dcp: __0_1.distcp does not exist"):
        load(*start, tmp_path / "dcp")
    remove_checksums(tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="builtins.print, which no checkpoint needs"):
        load(*start, tmp_path / "dcp")


def test_hugging_face_start_with_broken_weights_is_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    del weights["model.layers.0.attn.k_proj.weight"]
    save_file(weights, hf / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint.initial_load_in_hf: .*lack model.layers.0.attn.k_proj.weight"):
        load("--model.flavor", hf, "--checkpoint.initial_load_path", hf, "--checkpoint.initial_load_in_hf")


def test_start_with_a_head_of_its_own_is_refused_where_the_model_ties_it(tmp_path):
    args = small("delta_net")
    for name, is_tied in (("untied", False), ("tied", True)):
        sizes = replace(args, tie_word_embeddings=is_tied)
        from_hf(write_hf_folder(tmp_path / "hf" / name, sizes, random_weights(sizes)), tmp_path / name)
    tie = ("--model.flavor", tmp_path / "hf" / "untied", "--model.options", "tie_word_embeddings=true")
    load(*tie, "--checkpoint.initial_load_path", tmp_path / "tied")
    problem = "untied: output.weight differs from tok_embeddings.weight, but model.flavor with model.options ties them"
    with pytest.raises(UserError, match=f"checkpoint.initial_load_path: .*{problem}"):
        load(*tie, "--checkpoint.initial_load_path", tmp_path / "untied")
    config = load(*tie)
    with pytest.raises(UserError, match=f"checkpoint: .*{problem}"):
        check_checkpoint(config, resolve_args(config.model), tmp_path / "untied")


def test_run_with_checkpoints_of_its_own_needs_no_start(tmp_path):
    gone = ("--checkpoint.initial_load_path", tmp_path / "gone", "--job.dump_folder", tmp_path / "run")
    with pytest.raises(UserError, match="gone'; allowed: an existing folder"):
        load(*gone)
    step = tmp_path / "run" / "checkpoint" / "step-2"
    step.mkdir(parents=True)
    (step / ".metadata").write_bytes(b"")
    load(*gone)


@pytest.mark.parametrize(
    "overrides, setting",
    [
        (("--checkpoint.initial_load_path", "hf", "--checkpoint.initial_load_in_hf"), "initial_load_path is '.*hf'"),
        (("--model.hf_assets_path", "hf", "--checkpoint.initial_load_in_hf"), "initial_load_in_hf is true"),
        (("--checkpoint.load_step", "0"), "load_step is 0"),
    ],
)
def test_training_that_would_not_load_its_start_is_refused(tmp_path, overrides, setting):
    hf = hf_folder(tmp_path / "hf")
    (hf / "tokenizer.json").write_text("{}")
    common = ("--model.flavor", hf, *(hf if word == "hf" else word for word in overrides))
    refuse_unloaded_start(load(*common))
    refuse_unloaded_start(load("--checkpoint.no-enable", "--checkpoint.initial_load_path", ""))
    for blocker, words in (("no-enable", "enable is false"), ("create_seed_checkpoint", "create_seed_checkpoint is true")):
        with pytest.raises(UserError, match=f"checkpoint.{setting}, but checkpoint.{words}"):
            refuse_unloaded_start(load(*common, f"--checkpoint.{blocker}"))


def test_run_describes_itself_by_what_it_was_sized_by_or_starts_from(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    from_hf(hf, tmp_path / "dcp")
    raw = (hf / "config.json").read_bytes()
    args = small("delta_net")
    in_hf = ("--checkpoint.initial_load_path", hf, "--checkpoint.initial_load_in_hf")
    for overrides in (["--model.flavor", hf], ["--model.flavor", hf, *in_hf]):
        assert describe_run(load(*overrides), args, ByteTokenizer()) == ModelDescription(raw, made=byte_tokenizer_files())
    preset = FAMILIES["delta_net"].flavors["debug"]
    described = json.loads(describe_run(load(), preset, ByteTokenizer()).config)
    assert described == preset.to_hf_config() | {"eos_token_id": 256, "dtype": "float32"}


def test_run_that_starts_from_a_folder_of_its_preset_keeps_that_config(tmp_path):
    preset = FAMILIES["delta_net"].flavors["debug"]
    weights = random_weights(preset, torch.bfloat16)
    hf = write_hf_folder(tmp_path / "hf", preset, weights, bos_token_id=7)
    from_hf(hf, tmp_path / "dcp")
    config = load("--checkpoint.initial_load_path", tmp_path / "dcp")
    assert describe_run(config, preset, ByteTokenizer()).config == (hf / "config.json").read_bytes()


@pytest.mark.parametrize(
    "stated, weights, written",
    [
        ({}, torch.float32, {}),
        ({"dtype": None}, torch.float32, {"dtype": None}),
        ({"dtype": "float32"}, torch.float32, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, torch.float32, {"torch_dtype": "float32"}),
        ({"dtype": "float32"}, torch.bfloat16, {"dtype": "bfloat16"}),
    ],
)
def test_description_is_on_disk_before_the_checkpoint_and_states_its_dtype(tmp_path, monkeypatch, stated, weights, written):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    saved = []

    def dcp_save(state_dict, checkpoint_id, to_hf=False):
        assert (tmp_path / "step-3" / "tokenizer.json").read_text() == "{}"
        saved.append((json.loads((tmp_path / "step-3" / "config.json").read_text()), to_hf))

    checkpointer = SimpleNamespace(dcp_save=dcp_save)
    raw = json.dumps({"model_type": "delta_net"} | stated).encode()
    write_description_with_checkpoints(checkpointer, ModelDescription(raw, (tmp_path / "tokenizer.json",)))
    checkpointer.dcp_save({"tok_embeddings.weight": torch.ones(1, dtype=weights)}, str(tmp_path / "step-3"), to_hf=True)
    assert saved == [({"model_type": "delta_net"} | written, True)]
