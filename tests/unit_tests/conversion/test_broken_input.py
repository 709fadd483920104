"""A broken checkpoint gives one clear error that names the tensor or file, and nothing is written."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.inspection import inspect
from refine_titan.conversion.to_hf import to_hf
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from tests.checkpoints import INDEX, assert_nothing_left, convert_here, random_weights, write_hf_folder
from tests.hostile_checkpoints import remove_checksums

ARGS = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, vocab_size=8)
TIED = replace(ARGS, tie_word_embeddings=True)
FIRST, SECOND = "part-0.safetensors", "part-1.safetensors"


@pytest.fixture
def single(tmp_path):
    return write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))


@pytest.fixture
def sharded(tmp_path):
    # The embeddings and the head are in shard 0, the rest in shard 1.
    return write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS), lambda name: int("layers" in name))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path, by=10):
    os.truncate(path, path.stat().st_size - by)


def weights_of(**changes):
    return lambda folder: change_weights(folder / "model.safetensors", lambda w: w.update(changes))


def index_of(change):
    return lambda folder: change_index(folder, change)


def assert_refused(folder, out, message):
    """from-hf refuses with the message; inspect reports the same, or refuses too."""
    with pytest.raises(UserError) as error:
        from_hf(folder, out)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert_nothing_left(out)
    try:
        problems = inspect(folder).problems
    except UserError as refusal:
        problems = [str(refusal)]
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json holds '[1]', expected a JSON object"),
        (lambda f: change_config(f, model_type="mamba"), "config.json: model_type is 'mamba'; known: delta_net"),
        (lambda f: change_config(f, model_type=["delta_net"]), "model_type is ['delta_net']; known: delta_net"),
        (lambda f: change_config(f, new_flag=3), "config.json: new_flag = 3 is not a setting of delta_net"),
        (lambda f: change_config(f, use_output_norm=False), "use_output_norm is False; allowed: True"),
        (lambda f: change_config(f, hidden_size="64"), "hidden_size is '64'; allowed: a whole number"),
        (lambda f: change_config(f, num_heads=0), "num_heads is 0; allowed: at least 1, below 2^31"),
        (lambda f: change_config(f, hidden_ratio=float("inf")), "hidden_ratio is inf; allowed: a finite number above 0"),
        (lambda f: change_config(f, norm_eps=-1.0), "norm_eps is -1.0; allowed: a finite number above 0"),
        (lambda f: change_config(f, vocab_size=10**30), "allowed: at least 1, below 2^31"),
        (lambda f: change_config(f, vocab_size=2**30, hidden_size=2**30), "config.json: "),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
        (lambda f: change_config(f, vocab_size=2**62), "vocab_size is 4611686018427387904; allowed: at least 1, below 2^31"),
        (lambda f: change_config(f, num_hidden_layers=2), "the weights lack model.layers.1.attn_norm.weight"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'), "holds two sets of weights"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors.index.json"),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors cannot be read as safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read as safetensors"),
        (lambda f: change_weights(f / "model.safetensors", lambda w: w.pop("lm_head.weight")), "the weights lack lm_head.weight"),
        (weights_of(extra=torch.ones(1)), "the weights have a tensor this model does not know: extra"),
        (weights_of(**{"model.norm.weight": torch.ones(7)}), "model.norm.weight has shape [7], config.json says [256]"),
        (weights_of(**{"model.norm.weight": torch.ones(256).long()}), "model.norm.weight has dtype int64; allowed: float32"),
        (lambda f: change_config(f, tie_word_embeddings=True), "lm_head.weight differs from model.embeddings.weight"),
    ],
)
def test_broken_folder(single, tmp_path, damage, message):
    damage(single)
    assert_refused(single, tmp_path / "out", message)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / SECOND).unlink(), f"{SECOND} does not exist; {INDEX} says that it holds model.layers.0."),
        (lambda f: truncate(f / SECOND), f"{SECOND} cannot be read as safetensors"),
        (lambda f: change_weights(f / FIRST, lambda w: w.pop("lm_head.weight")), f"{FIRST} lacks lm_head.weight, which {INDEX} says"),
        (lambda f: change_weights(f / FIRST, lambda w: w.update(extra=torch.ones(1))), f"{FIRST} holds extra, which {INDEX} does not"),
        (index_of(lambda i: i["weight_map"].pop("lm_head.weight")), f"{FIRST} holds lm_head.weight, which {INDEX} does not say"),
        (index_of(lambda i: i["weight_map"].update({"lm_head.weight": SECOND})), f"{SECOND} lacks lm_head.weight"),
        (index_of(lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"})), "lm_head.weight is in '../x.safetensors'"),
        (index_of(lambda i: i["weight_map"].update({"lm_head.weight": 3})), "lm_head.weight is in 3"),
        (index_of(lambda i: i.pop("weight_map")), f"{INDEX}: weight_map is None"),
        (lambda f: (f / INDEX).write_text("nonsense"), f"{INDEX} is not JSON"),
    ],
)
def test_broken_shards(sharded, tmp_path, damage, message):
    damage(sharded)
    assert_refused(sharded, tmp_path / "out", message)


def test_inspect_lists_every_mismatch(single, sharded):
    def change(weights):
        del weights["lm_head.weight"]
        weights |= {"extra": torch.ones(1), "model.norm.weight": torch.ones(7)}

    (single / INDEX).unlink()
    change_weights(single / FIRST, change)
    weights = load_file(single / FIRST) | load_file(single / SECOND)
    save_file(weights, single / "model.safetensors")
    result = convert_here("inspect", single)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: the weights lack lm_head.weight",
        "error: the weights have a tensor this model does not know: extra",
        "error: model.norm.weight has shape [7], config.json says [256]",
    ]
    assert "model.layers.0.mlp.down_proj.weight" in result.stdout


@pytest.mark.parametrize("command", [("inspect",), ("from-hf", "OUT"), ("to-hf", "OUT")])
def test_command_line_refuses_a_folder_without_checkpoint(tmp_path, command):
    out = tmp_path / "out"
    result = convert_here(command[0], tmp_path / "nowhere", *(out for _ in command[1:]))
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "nowhere" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert_nothing_left(out)


@pytest.mark.parametrize("size", ["0GB", "1XB", "GB", "-1GB"])
def test_command_line_refuses_a_size(tmp_path, size):
    result = convert_here("to-hf", tmp_path, tmp_path / "out", f"--max-shard-size={size}")
    assert result.returncode == 2 and "is not a size; allowed: a number above 0" in result.stderr


@pytest.fixture
def checkpoint(single, tmp_path):
    """As another program writes it."""
    from_hf(single, tmp_path / "dcp")
    remove_checksums(tmp_path / "dcp")
    return tmp_path / "dcp"


def rewrite(folder, change):
    """Writes the DCP checkpoint again, with its entries changed."""
    from tests.unit_tests.conversion.test_round_trip import read_dcp

    state = read_dcp(folder, ARGS)
    change(state)
    for path in folder.glob("*.distcp"):
        path.unlink()
    (folder / ".metadata").unlink()
    dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / ".metadata").unlink(), ".metadata"),
        (lambda f: truncate(f / ".metadata"), ".metadata cannot be read as DCP metadata"),
        (lambda f: (f / ".metadata").write_bytes(b"nonsense"), ".metadata cannot be read as DCP metadata"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps(RunsCode())), "posix.mkdir, which no checkpoint needs"),
        (lambda f: (f / "__0_3.distcp").unlink(), "__0_3.distcp does not exist"),
        (lambda f: truncate(f / "__0_3.distcp"), "__0_3.distcp is truncated"),
        (lambda f: rewrite(f, lambda s: s.pop("norm.weight")), "the weights lack norm.weight"),
        (lambda f: rewrite(f, lambda s: s.update(ema=torch.ones(1))), "a tensor this model does not know: ema"),
        (lambda f: rewrite(f, lambda s: s.update(optimizer_ema=torch.ones(1))), "does not know: optimizer_ema"),
        (lambda f: rewrite(f, lambda s: s.update(note="text")), "note is not a tensor"),
        (lambda f: rewrite(f, lambda s: s.update({"norm.weight": torch.ones(7)})), "norm.weight has shape [7], config.json says [256]"),
        (lambda f: change_config(f, tie_word_embeddings=True), "output.weight differs from tok_embeddings.weight"),
        (lambda f: change_config(f, unknown=True), "unknown = True is not a setting of delta_net"),
    ],
)
def test_broken_dcp(checkpoint, tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    damage(checkpoint)
    with pytest.raises(UserError) as error:
        to_hf(checkpoint, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert_nothing_left(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    try:
        problems = inspect(checkpoint).problems
    except UserError as refusal:
        problems = [str(refusal)]
    assert any(message in problem for problem in problems), problems


def test_damaged_dcp_data_is_named_when_it_is_read(checkpoint, tmp_path):
    path = checkpoint / "__0_3.distcp"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match="layers.0.mixer.k_proj.weight cannot be read from __0_3.distcp"):
        to_hf(checkpoint, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_dcp_without_config_is_listed(checkpoint):
    (checkpoint / "config.json").unlink()
    report = inspect(checkpoint)
    assert report.problems == [] and report.lines[0].endswith("DCP checkpoint, no config.json")
    assert any(line.startswith("layers.0.mixer.q_proj.weight") for line in report.lines)
