"""Checkpoints with tensors beside the model: who reads the model, who keeps the rest, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_titan.conversion.carried import CARRIED_FILE
from refine_titan.conversion.description import stated_dtype, with_dtype
from refine_titan.conversion.from_hf import from_hf
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.inference import load_weights
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.model_config import ModelConfig
from refine_titan.models.sizes import resolve_args
from refine_titan.starting_point import describe_run
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder

BESIDE = {"model.visual.patch_embed.proj.weight": torch.ones(5, 3), "mtp.fc.weight": torch.zeros(2)}


@pytest.fixture
def start(tmp_path):
    """A published folder of Qwen3.5 with vision tower and multi-token head, and the same as a DCP checkpoint."""
    args = replace(FAMILIES["qwen3_5"].flavors["debug"], n_layers=4, dim=64, intermediate_size=64, vocab_size=264, is_part_of_larger=True)
    hf = write_hf_folder(tmp_path / "hf", args, random_weights(args))
    wrapper = {"model_type": "qwen3_5", "text_config": args.to_hf_config(), "vision_config": {"depth": 1}, "tie_word_embeddings": True}
    (hf / "config.json").write_text(json.dumps(wrapper))
    weights = load_file(hf / "model.safetensors")
    save_file(weights | BESIDE, hf / "model.safetensors", metadata={"format": "pt"})
    from_hf(hf, tmp_path / "dcp")
    return tmp_path


def job(*overrides):
    return load_config([str(o) for o in ("--model.name", "qwen3_5", *overrides)])


def starts(folder):
    """A job that starts from each of the two."""
    common = ("--model.flavor", folder / "hf", "--checkpoint.initial_load_path")
    return [(*common, folder / "hf", "--checkpoint.initial_load_in_hf"), (*common, folder / "dcp")]


def test_a_published_folder_answers_like_its_conversion(start):
    found = []
    for folder in ("hf", "dcp"):
        model = build_decoder(replace(ModelConfig.read(start / "hf").args, is_part_of_larger=False))
        load_weights(model, start / folder)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) and tensor.abs().sum() > 0 for name, tensor in found[1].items())


def test_a_resumed_run_needs_no_start_and_keeps_what_it_carries(start):
    own = start / "run" / "checkpoint"
    for overrides in starts(start):
        config = job(*overrides)
        args = resolve_args(config.model)
        described = describe_run(config, args, ByteTokenizer())
        assert described.carried is not None
        for step in (1, 2):
            shutil.rmtree(own / f"step-{step}", ignore_errors=True)
            described.write(own / f"step-{step}")
            (own / f"step-{step}" / ".metadata").touch()
    gone = start / "gone"
    for part in ("hf", "dcp"):
        (start / part).rename(start / f"{part} elsewhere")
    for in_hf in (True, False):
        config.model.flavor, config.checkpoint.initial_load_path, config.checkpoint.initial_load_in_hf = "debug", str(gone), in_hf
        again = describe_run(config, args, ByteTokenizer(), own / "step-1")
        shutil.move(own / "step-1", start / "removed")  # as keep_latest_k does in time
        again.write(own / "step-3")
        assert all(torch.equal(tensor, BESIDE[name]) for name, tensor in load_file(own / "step-3" / CARRIED_FILE).items())
        assert json.loads(again.config)["model_type"] == "qwen3_5"
        shutil.move(start / "removed", own / "step-1")
        shutil.rmtree(own / "step-3")


def test_last_checkpoint_for_hugging_face_is_refused(start):
    for overrides in starts(start):
        config = job(*overrides, "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")
        with pytest.raises(UserError, match="checkpoint.last_save_in_hf is true, but that folder would lack .* allowed: false"):
            describe_run(config, resolve_args(config.model), ByteTokenizer())


def test_description_with_options_reads_as_the_runs_model(start):
    for options in ("tie_word_embeddings=false", "n_layers=2"):
        config = job("--model.flavor", start / "hf", "--model.options", options)
        args = resolve_args(config.model)
        (start / "config.json").write_bytes(describe_run(config, args, ByteTokenizer()).config)
        assert ModelConfig.read(start).args == args


def test_what_the_checkpoint_says_is_no_option():
    with pytest.raises(UserError, match="this family has no option 'is_part_of_larger'"):
        job("--model.options", "is_part_of_larger=true")


def test_dtype_of_the_text_model_is_read_and_set_where_it_stands():
    nested = json.dumps({"model_type": "qwen3_5", "text_config": {"dtype": "bfloat16"}}).encode()
    assert stated_dtype(nested) == "bfloat16"
    assert json.loads(with_dtype(nested, torch.float32)) == {"model_type": "qwen3_5", "text_config": {"dtype": "float32"}}
    outer = json.dumps({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}).encode()
    assert json.loads(with_dtype(outer, torch.bfloat16))["dtype"] == "bfloat16"
