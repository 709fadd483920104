"""From a Hugging Face folder through a run and back, by the command lines a researcher types."""

import json
from dataclasses import replace

import pytest
import torch

from refine_titan.models import FAMILIES
from tests.checkpoints import assert_same_bits, convert_here, random_weights, read_hf_folder, write_hf_folder
from tests.integration_tests.runs import assert_finished, losses, train


def run_arguments(family: str, flavor) -> list[str]:
    # One optimizer step a batch: a step's loss is that of the weights it began with.
    return ["--model.name", family, "--model.flavor", str(flavor), "--training.steps", "2", "--refine.num_mini_batches", "1"]


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name == "delta_net" else pytest.mark.slow) for name in FAMILIES])
def test_from_hf_then_train_then_to_hf(tmp_path, family):
    args = replace(FAMILIES[family].flavors["debug"], n_layers=1, vocab_size=264)
    weights = random_weights(args, torch.bfloat16)
    hf = write_hf_folder(tmp_path / "hf", args, weights, lambda name: "mlp" in name, dtype="bfloat16", bos_token_id=3)
    start = tmp_path / "dcp"
    assert convert_here("from-hf", hf, start).returncode == 0

    arguments = [*run_arguments(family, start), "--checkpoint.initial_load_path", str(start), "--optimizer.lr", "1e-3"]
    frozen = [*arguments, "--optimizer.lr", "0", "--training.steps", "1"]
    assert_finished(train(tmp_path / "frozen", *frozen))
    assert_finished(train(tmp_path / "run", *arguments))
    assert losses(tmp_path / "run")[0]["refine/ntp_loss"] == losses(tmp_path / "frozen")[0]["refine/ntp_loss"]

    # Nothing was learnt with a learning rate of zero: the weights are those of the start, in the run's float32.
    result = convert_here("to-hf", tmp_path / "frozen" / "checkpoint" / "step-1", tmp_path / "unchanged")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert_same_bits(read_hf_folder(tmp_path / "unchanged"), {name: tensor.float() for name, tensor in weights.items()})
    config = json.loads((tmp_path / "unchanged" / "config.json").read_text())
    assert config == json.loads((hf / "config.json").read_text()) | {"dtype": "float32"}

    last = tmp_path / "run" / "checkpoint" / "step-2"
    assert convert_here("inspect", last).returncode == 0
    result = convert_here("to-hf", last, tmp_path / "trained", "--dtype", "bfloat16")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    trained = read_hf_folder(tmp_path / "trained")
    assert {name: tensor.shape for name, tensor in trained.items()} == {name: tensor.shape for name, tensor in weights.items()}
    kept = args.hf_format.keep_in_float32 or ("nothing",)
    assert all((tensor.dtype == torch.float32) == name.endswith(kept) for name, tensor in trained.items())
    embeddings = next(iter(weights))
    assert not torch.equal(trained[embeddings], weights[embeddings])
    assert json.loads((tmp_path / "trained" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


@pytest.mark.slow
def test_vision_tower_is_carried_through_training(tmp_path):
    """A published layout of Qwen3.5: what is beside the text model comes back with the same bits, the text model trained."""
    args = replace(FAMILIES["qwen3_5"].flavors["debug"], n_layers=1, vocab_size=264, is_part_of_larger=True)
    weights = random_weights(args, torch.bfloat16)
    assert all(name.startswith("model.language_model.") for name in weights)
    generator = torch.Generator().manual_seed(1)
    beside = {name: torch.randn(5, 3, generator=generator) for name in ("model.visual.patch_embed.proj.weight", "mtp.fc.weight")}
    wrapper = {"model_type": "qwen3_5", "text_config": args.to_hf_config(), "vision_config": {"depth": 1}, "tie_word_embeddings": True}
    hf = write_hf_folder(tmp_path / "hf", args, weights | beside, lambda name: "mtp" in name)
    (hf / "config.json").write_text(json.dumps(wrapper))

    arguments = [*run_arguments("qwen3_5", hf), "--checkpoint.initial_load_path", str(hf), "--optimizer.lr", "1e-3"]
    result = train(tmp_path / "run", *arguments, "--checkpoint.initial_load_in_hf", "--checkpoint.interval", "1")
    assert_finished(result)
    assert "2 tensors of model.visual, mtp (0.0 MiB) are carried along as they are, not trained" in result.stdout + result.stderr
    result = convert_here("to-hf", tmp_path / "run" / "checkpoint" / "step-2", tmp_path / "back")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    back = read_hf_folder(tmp_path / "back")
    assert back.keys() == weights.keys() | beside.keys()
    assert_same_bits({name: back[name] for name in beside}, beside)
    assert not any(torch.equal(back[name], weights[name]) for name in weights if "proj" in name)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == wrapper


@pytest.mark.slow
def test_run_exported_by_torchtitan_is_loaded_by_the_library(tmp_path):
    import fla.models

    exported = tmp_path / "run" / "checkpoint" / "step-2"
    arguments = ["--training.steps", "2", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    assert_finished(train(tmp_path / "run", *arguments, "--checkpoint.export_dtype", "bfloat16"))
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    model, report = fla.models.DeltaNetForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.config.eos_token_id == 256
    # Folders of torchtitan's making are read like any other.
    assert convert_here("inspect", exported).returncode == 0


@pytest.mark.slow
def test_asynchronous_and_purged_checkpoints_carry_the_description(tmp_path):
    assert_finished(train(tmp_path, "--checkpoint.async_mode", "async", "--checkpoint.keep_latest_k", "2"))
    steps = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert steps[-1] == "step-6"
    for step in steps[-2:]:
        assert json.loads((tmp_path / "checkpoint" / step / "config.json").read_text())["hidden_size"] == 256
        assert convert_here("inspect", tmp_path / "checkpoint" / step).returncode == 0


@pytest.mark.slow
def test_checkpoint_written_by_two_ranks_is_exported_whole(tmp_path):
    arguments = ["--training.steps", "1", "--refine.num_mini_batches", "1", "--optimizer.lr", "0"]
    assert_finished(train(tmp_path / "two", *arguments, ranks=2))
    assert_finished(train(tmp_path / "one", *arguments))
    for name in ("one", "two"):
        assert convert_here("to-hf", tmp_path / name / "checkpoint" / "step-1", tmp_path / f"{name}_hf").returncode == 0
    assert_same_bits(read_hf_folder(tmp_path / "two_hf"), read_hf_folder(tmp_path / "one_hf"))
