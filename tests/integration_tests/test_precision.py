"""Float8, activation checkpointing and compile in real runs of the whole step, with each other and with layouts of ranks."""

import json
import subprocess
import sys

import pytest
import torch

from refine_titan.conversion.dcp_weights import DCPWeights
from tests.integration_tests.runs import REPOSITORY, assert_finished, losses, train
from tests.integration_tests.test_layouts import COMMON, TENSOR_2, run_layouts

pytestmark = pytest.mark.slow
pytest.importorskip("torchao")
FLOAT8 = ["--model.converters", "quantize.linear.float8", "--quantize.linear.float8.emulate"]
ROWWISE = [*FLOAT8, "--quantize.linear.float8.recipe_name", "rowwise"]
GATHER = ["--quantize.linear.float8.enable_fsdp_float8_all_gather"]
PRECOMPUTE = ["--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"]
FULL = ["--activation_checkpoint.mode", "full"]
OPERATORS = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]
COMPILE = ["--compile.enable"]


@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact", "qwen3_5"])
def test_checkpointing_and_compile_with_layouts_are_one_eager_process(tmp_path, family):
    """lact without Muon's amplified rounding at a small learning rate, as in `test_layouts.py`."""
    run_layouts(
        tmp_path,
        family,
        {
            "one": (1, []),
            "full": (1, FULL),
            "operators": (1, OPERATORS),
            "compile": (1, [*COMPILE, *FULL]),
            "compile_tp": (2, [*COMPILE, *FULL, *TENSOR_2]),
        },
    )


@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact", "qwen3_5"])
def test_compile_and_checkpointing_change_nothing_for_sharded_ranks(tmp_path, family):
    run_layouts(tmp_path, family, {"fsdp": (2, []), "both": (2, [*COMPILE, *FULL])})


@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact", "qwen3_5"])
def test_checkpointing_changes_no_bit_of_float8_training(tmp_path, family):
    common = [*COMMON, *ROWWISE, "--model.name", family, "--training.steps", "3"]
    runs = {"none": [], "full": FULL, "operators": OPERATORS}
    for name, settings in runs.items():
        assert_finished(train(tmp_path / name, *common, *settings))
    assert losses(tmp_path / "full") == losses(tmp_path / "none") == losses(tmp_path / "operators")


def test_float8_all_gather_is_the_same_training_and_saves_high_precision(tmp_path):
    """With scales of whole tensors, cast before or after the gather is the same cast. The checkpoint needs no torchao."""
    common = [*COMMON, *FLOAT8, "--training.steps", "4", "--checkpoint.interval", "2"]
    runs = {"plain": [], "gather": GATHER, "precompute": [*GATHER, *PRECOMPUTE]}
    for name, settings in runs.items():
        assert_finished(train(tmp_path / name, *common, *settings, ranks=2))
    assert losses(tmp_path / "gather") == losses(tmp_path / "plain") == losses(tmp_path / "precompute")
    saved, expected = (DCPWeights(tmp_path / name / "checkpoint" / "step-4") for name in ("precompute", "plain"))
    for name, stored in saved.tensors.items():
        assert stored.dtype == torch.float32 and torch.equal(saved.read(name), expected.read(name)), name
    without_torchao = (
        "import sys; sys.modules['torchao'] = None; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    checkpoint, output = tmp_path / "precompute" / "checkpoint" / "step-4", tmp_path / "hf"
    command = [sys.executable, "-c", without_torchao, "tools/convert_checkpoint.py", "to-hf", str(checkpoint), str(output)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == 0
    assert (output / "config.json").is_file()


def test_float8_run_resumes_bitwise(tmp_path):
    common = [*COMMON, *FLOAT8, *GATHER, *PRECOMPUTE, "--checkpoint.interval", "2"]
    assert_finished(train(tmp_path / "whole", *common, "--training.steps", "4", ranks=2))
    assert_finished(train(tmp_path / "halves", *common, "--training.steps", "2", ranks=2))
    assert_finished(train(tmp_path / "halves", *common, "--training.steps", "4", ranks=2))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_float8_tensor_parallel_is_close_to_one_process(tmp_path):
    """Not equal: scales of rows that are sharded are those of a rank's own channels, and a rounding that falls on the other
    side is a whole float8 step."""
    common = [*COMMON, *ROWWISE, "--training.steps", "2"]
    for name, ranks, settings in (("one", 1, []), ("tp", 2, TENSOR_2)):
        assert_finished(train(tmp_path / name, *common, *settings, ranks=ranks))
    for ours, theirs in zip(losses(tmp_path / "tp"), losses(tmp_path / "one"), strict=True):
        assert ours["refine/ntp_loss"] == pytest.approx(theirs["refine/ntp_loss"], rel=2e-3)


def test_vllm_engine_of_high_precision_serves_a_float8_trainer(tmp_path):
    assert_finished(train(tmp_path, *COMMON, *FLOAT8, "--rollout.engine", "vllm", "--training.steps", "3"))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(1e-5 < record["rollout/logprob_gap_max"] < 0.5 for record in records)
