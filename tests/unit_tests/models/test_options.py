"""`[model] options`: fields of a family's args that a run overrides."""

import json
from dataclasses import replace

import pytest
import torch

from refine_titan.conversion.from_hf import from_hf
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.model_config import ModelConfig
from refine_titan.models.sizes import Flavors, resolve_args
from refine_titan.rollout.vllm_settings import config_json, unwritten_args
from refine_titan.starting_point import describe_run
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder

LACT = ("--model.name", "lact")


def load(*overrides):
    return load_config([str(override) for override in overrides])


def test_values_have_the_types_of_the_fields_and_what_follows_from_them():
    options = "chunk_size=64,newton_schulz_dtype=float32,inter_multi=2,qkv_bias=true,intermediate_size=none"
    args = resolve_args(load(*LACT, "--model.options", options).model)
    expected = dict(chunk_size=64, newton_schulz_dtype="float32", inter_multi=2, qkv_bias=True, intermediate_size=None)
    assert args == replace(FAMILIES["lact"].flavors["debug"], **expected)
    assert args.fast_hidden_dim == 2 * FAMILIES["lact"].flavors["debug"].fast_hidden_dim
    assert resolve_args(load("--model.name", "kda", "--model.options", "lower_bound=-2.5").model).lower_bound == -2.5


@pytest.mark.parametrize(
    "options, message",
    [
        ("chunk=64", "this family has no option 'chunk'; it has: vocab_size, .*chunk_size, .*newton_schulz_dtype$"),
        ("_enforced=x", "this family has no option '_enforced'"),
        ("head_dim=64", "this family has no option 'head_dim'"),  # follows from others
        ("chunk_size", "'chunk_size' is not written name=value; names: vocab_size"),
        ("chunk_size=8,chunk_size=9", "chunk_size is given twice"),
        ("chunk_size=8.5", "chunk_size is '8.5'; allowed: a whole number$"),
        ("chunk_size=true", "chunk_size is 'true'; allowed: a whole number$"),
        ("chunk_size=none", "chunk_size is 'none'; allowed: a whole number$"),
        ("intermediate_size=wide", "intermediate_size is 'wide'; allowed: a whole number, or none$"),
        ("newton_schulz_dtype=float16", "newton_schulz_dtype is 'float16'; allowed: 'bfloat16', 'float32'$"),
        ("use_muon=1", "use_muon is '1'; allowed: true or false$"),
        ("chunk_size=0", "chunk_size is 0; allowed: at least 1"),
        ("norm_eps=nan", "norm_eps is nan; allowed: a finite number above 0"),
        ("dim=250", r"dim must be a whole multiple of n_attn_heads \(4\), got 250"),
    ],
)
def test_option_that_is_not_one_names_what_there_is(options, message):
    with pytest.raises(UserError, match="^model.options: " + message):
        load(*LACT, "--model.options", options)


def test_options_of_one_run_are_not_those_of_the_next():
    flavors = Flavors("lact")
    args = flavors["debug"]
    args.update_from_config(load(*LACT, "--model.options", "window_size=8"))
    assert (args.window_size, args.reach(), flavors["debug"].window_size) == (8, 7, 128)


def test_models_that_must_agree_compute_in_float32_also_when_they_are_built():
    model = build_decoder(replace(FAMILIES["lact"].flavors["debug"], n_layers=1))
    model.model_args.compute_in_float32()
    assert model.layers["0"].mixer.args.newton_schulz_dtype == "float32"


@pytest.fixture
def start(tmp_path):
    """A LaCT in Hugging Face's terms, and the same as a DCP checkpoint."""
    args = replace(FAMILIES["lact"].flavors["debug"], n_layers=1, vocab_size=264)
    from_hf(write_hf_folder(tmp_path / "hf", args, random_weights(args)), tmp_path / "dcp")
    return tmp_path


def starts(folder):
    flavor = (*LACT, "--model.flavor", folder / "hf", "--checkpoint.initial_load_path")
    return [(*flavor, folder / "hf", "--checkpoint.initial_load_in_hf"), (*flavor, folder / "dcp")]


def test_checkpoints_say_what_was_overridden_and_nothing_else(start):
    raw = (start / "hf" / "config.json").read_bytes()
    for overrides in starts(start):
        config = load(*overrides, "--model.options", "newton_schulz_dtype=float32,chunk_size=256")
        assert describe_run(config, resolve_args(config.model), ByteTokenizer()).config == raw  # one is not said there, one is the same
        config = load(*overrides, "--model.options", "newton_schulz_dtype=float32,chunk_size=32")
        described = describe_run(config, resolve_args(config.model), ByteTokenizer()).config
        assert json.loads(described) == json.loads(raw) | {"lact_chunk_size": 32}
        (start / "config.json").write_bytes(described)
        read = ModelConfig.read(start).args
        assert replace(read, newton_schulz_dtype="float32") == resolve_args(config.model)


def test_weights_of_another_shape_than_the_options_ask_for_are_refused(start):
    in_hf, in_dcp = starts(start)
    with pytest.raises(UserError, match="initial_load_in_hf: .*lr_proj.* has shape .*, config.json with model.options says "):
        load(*in_hf, "--model.options", "lr_dim=128")
    with pytest.raises(UserError, match="initial_load_path: .*lr_proj.* has shape .*, model.flavor with model.options says "):
        load(*in_dcp, "--model.options", "lr_dim=128")


def test_vllm_is_given_the_overridden_options():
    config = load(*LACT, "--model.options", "newton_schulz_dtype=float32,chunk_size=32")
    args = resolve_args(config.model)
    assert json.loads(config_json(args))["lact_chunk_size"] == 32
    assert unwritten_args(args)["newton_schulz_dtype"] == "float32"
    written = type(args).from_hf_config(json.loads(config_json(args)))
    assert replace(written, **unwritten_args(args)) == args


@pytest.mark.parametrize("family", FAMILIES)
def test_built_model_is_that_of_the_options(family):
    args = resolve_args(load("--model.name", family, "--model.options", "n_layers=1,vocab_size=264").model)
    with torch.device("meta"):
        model = build_decoder(args)
    assert len(model.layers) == 1 and model.tok_embeddings.weight.shape[0] == 264
