"""Post-training as whole runs: what is learnt and written, resuming after SIGKILL, layouts of several ranks, what is refused."""

import itertools
import json
import signal
from pathlib import Path

import pytest

from tests.here import train_here
from tests.integration_tests.runs import REPOSITORY, assert_finished, train
from tests.integration_tests.test_layouts import CONTEXT_2, TENSOR_2, model_of
from tests.questions import write_questions

SLOW = pytest.mark.slow
POSTTRAIN = REPOSITORY / "tests" / "assets" / "tiny_posttrain.toml"
REWARD = ["--posttrain.outer", "reward", "--posttrain.samples", "4", "--posttrain.task", "ruler/niah_single_1"]
# Everything of a step that must repeat to the last bit; times and memory are left out.
REPEATABLE = (
    "step",
    "loss_metrics/global_avg_loss",
    "refine/ntp_loss",
    "refine/pg_loss",
    "rollout/reward_mean",
    "grad_norm",
    "rollout/logprob_gap",
    "refine/answer_loss",
    "refine/answer_tokens",
    "refine/answer_pg_loss",
    "rollout/task_reward",
    "refine/outer_grad_norm",
    "refine/weight_version",
    "refine/skipped_updates",
)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(folder: Path) -> list[dict]:
    return [{name: record.get(name) for name in REPEATABLE} for record in records(folder)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[str]:
    """Settings of the questions' file."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(path, count=32, longest=400)
    return ["--data.source", str(path)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, questions) -> Path:
    folder = tmp_path_factory.mktemp("run")
    result = train(folder, *questions, config=POSTTRAIN, threads=1)
    assert_finished(result)
    (folder / "log").write_text(result.stdout)
    return folder


def test_answer_loss_falls_and_every_step_has_an_outer_one(finished_run):
    steps = records(finished_run)
    assert [record["refine/weight_version"] for record in steps] == [3, 6, 9, 12, 15, 18]  # two inner steps and one outer each
    assert steps[-1]["refine/answer_loss"] < steps[0]["refine/answer_loss"] - 1.5
    assert all(4 * 4 <= record["refine/answer_tokens"] <= 4 * 6 for record in steps)  # a space and a colour, four times
    assert all(record["refine/outer_grad_norm"] > 0 and record["rollout/logprob_gap_max"] < 1e-4 for record in steps)
    assert {"timing/score", "timing/rollout", "timing/update", "timing/outer"} <= steps[0].keys()
    log = (finished_run / "log").read_text()
    assert "answer loss:" in log and "cut for their length:" in log and " prompts in the first pass" in log
    assert all(f"answer {record['refine/answer_loss']:.4f}" in log for record in steps)


@pytest.mark.parametrize("outer", ["sft", pytest.param("reward", marks=SLOW)])
def test_killed_run_goes_on_bitwise(finished_run, tmp_path, questions, outer):
    options = [*questions, *(REWARD if outer == "reward" else [])]
    whole = finished_run
    if outer == "reward":
        whole = tmp_path / "whole"
        assert_finished(train(whole, *options, config=POSTTRAIN, threads=1))
    killed = tmp_path / "killed"
    assert train(killed, *options, config=POSTTRAIN, threads=1, fault="outer:5").returncode == -signal.SIGKILL
    resumed = train(killed, *options, config=POSTTRAIN, threads=1)
    assert_finished(resumed)
    assert "Training starts at step 5" in resumed.stdout
    assert repeatable(killed) == repeatable(whole)
    assert (killed / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


@SLOW
@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_rewarded_answers_are_sampled_scored_and_written(tmp_path, questions, engine):
    if engine == "vllm":
        pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    assert_finished(train(tmp_path, *questions, *REWARD, "--rollout.engine", engine, config=POSTTRAIN, threads=1))
    steps = records(tmp_path)
    assert all(
        0 <= r["rollout/task_reward"] <= 1 and r["rollout/answer_logprob_gap_max"] < 1e-4 and "refine/answer_loss" not in r for r in steps
    )
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    answers = [line for line in lines if line.get("outer")]
    assert len(answers) == 6 * 8 and {line["engine"] for line in lines} == {engine}
    assert all(line["truth"] in line["answers"] and line["prefix_tail"].endswith("Answer:") for line in answers)


@SLOW
def test_outer_step_alone_and_ntp_before_it(tmp_path, questions):
    alone = [*questions, "--posttrain.no-inner", "--training.steps", "3"]
    assert_finished(train(tmp_path / "alone", *alone, config=POSTTRAIN, threads=1))
    steps = records(tmp_path / "alone")
    assert [record["refine/weight_version"] for record in steps] == [1, 2, 3] and steps[0]["refine/ntp_loss"] is None
    assert (
        steps[-1]["loss_metrics/global_avg_loss"] == steps[-1]["refine/answer_loss"] < steps[0]["refine/answer_loss"]
        and steps[0]["rollout/reward_mean"] is None
    )
    ntp = [*questions, "--refine.objective", "ntp", "--training.steps", "3"]
    assert_finished(train(tmp_path / "ntp", *ntp, config=POSTTRAIN, threads=1))
    steps = records(tmp_path / "ntp")
    assert [record["refine/weight_version"] for record in steps] == [3, 6, 9] and steps[-1]["refine/answer_loss"] < steps[0][
        "refine/answer_loss"
    ]


@SLOW
def test_outer_step_without_a_finite_gradient_is_skipped(tmp_path, questions):
    result = train(tmp_path, *questions, "--training.steps", "2", config=POSTTRAIN, threads=1, fault="infinite:2")
    assert_finished(result)
    steps = records(tmp_path)
    assert [record["refine/weight_version"] for record in steps] == [3, 5] and [r["refine/skipped_updates"] for r in steps] == [0, 1]
    assert steps[1]["refine/outer_grad_norm"] is None and steps[1]["grad_norm"] > 0


@SLOW
@pytest.mark.parametrize("family, outer", itertools.product(("delta_net", "lact", "qwen3_5"), ("sft", "reward")))
def test_layouts_are_one_process(tmp_path, questions, family, outer):
    """From one seed checkpoint, argmax positions, greedy rollouts; prompts of many lengths, whose rows ranks share."""
    common = [
        *questions,
        *model_of(family, tmp_path / "model"),
        "--refine.temperature",
        "0",
        "--refine.selection",
        "argmax",
        "--training.steps",
        "3",
        "--optimizer.lr",
        "1e-4",
        "--data.shuffle_buffer",
        "1",
        "--data.num_streams",
        "2",
        "--refine.num_mini_batches",
        "1",
    ]
    # A score of likeness, which tells also the answers of an untrained model apart.
    common += [*REWARD, "--posttrain.task", "longbench/lcc"] if outer == "reward" else []
    assert_finished(train(tmp_path / "seed", *common, "--checkpoint.create_seed_checkpoint", config=POSTTRAIN, threads=1))
    common += ["--checkpoint.initial_load_path", str(tmp_path / "seed" / "checkpoint" / "step-0")]
    # Two prompts a microbatch on one rank, or one on each of two: draws are named by a sequence's number in the batch.
    one_each = ["--training.local_batch_size", "1"]
    layouts = {
        "one": (1, one_each),
        "accumulated": (1, []),
        "fsdp": (2, one_each),
        "tp": (2, [*one_each, *TENSOR_2]),
        "cp": (2, [*one_each, *CONTEXT_2]),
        "tp_cp": (4, [*one_each, *TENSOR_2, *CONTEXT_2]),
        "fsdp_cp": (4, [*one_each, *CONTEXT_2]),
    }
    for name, (ranks, settings) in layouts.items():
        assert_finished(train(tmp_path / name, *common, *settings, config=POSTTRAIN, threads=1, ranks=ranks))
        for ours, theirs in zip(records(tmp_path / name), records(tmp_path / "one"), strict=True):
            assert ours["refine/answer_tokens"] == theirs["refine/answer_tokens"]
            for key in (
                "loss_metrics/global_avg_loss",
                "rollout/reward_mean",
                "grad_norm",
                "refine/outer_grad_norm",
                "refine/answer_loss",
                "rollout/task_reward",
                "refine/answer_pg_loss",
            ):
                if theirs.get(key) is not None:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (name, ours["step"], key)
            assert ours["refine/outer_grad_norm"] > 0.01


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["--refine.phase", "ttt"],
            "refine.phase is 'ttt', which adapts to the prompts of an evaluation: refine-titan evaluate run takes this file",
        ),
        ([*REWARD, "--posttrain.task", "ruler_qa/squad"], "posttrain.task is 'ruler_qa/squad': task 'squad' is not one of ruler_qa"),
        (["--data.source", "nowhere.jsonl"], "data.source is 'nowhere.jsonl': no such file or folder"),
        (["--data.source", "python-stdlib"], "post-training takes prompts with answers"),
        (
            ["--data.answer_column", "target", "--data.source", str(REPOSITORY / "tests/assets/questions.jsonl")],
            "has the columns: prompt, answer",
        ),
    ],
)
def test_wrong_run_is_refused_by_the_run_and_by_the_dry_run(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("NGPU", "1")
    for mode in (["--dry-run"], []):
        result = train_here(tmp_path / "run", *overrides, *mode, config=POSTTRAIN)
        assert result.returncode == 1 and "error: " in result.stderr and message in result.stderr and "Traceback" not in result.stderr


def test_dry_run_describes_prompts_and_both_kinds_of_steps(tmp_path, monkeypatch, questions):
    monkeypatch.setenv("NGPU", "1")
    result = train_here(tmp_path / "run", *questions, "--dry-run", config=POSTTRAIN)
    assert result.returncode == 0
    out = result.stdout
    assert "4 prompt(s) of at most 290 tokens per step, answers of at most 10" in out
    assert "2 optimizer step(s) on the prompts, then one on the answers per batch, 6 steps" in out and "questions.jsonl:" in out
