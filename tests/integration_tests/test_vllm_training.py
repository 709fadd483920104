"""Whole runs with vLLM: the same training as with the native engine, several ranks, resuming, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from tests.integration_tests.runs import REPOSITORY, TINY, assert_finished, losses, train, train_side_by_side

VLLM = ["--rollout.engine", "vllm"]
GREEDY = ["--refine.temperature", "0", "--refine.selection", "argmax"]
TEN_STEPS = ["--training.steps", "10", "--checkpoint.interval", "10"]


def rollout_tokens(folder: Path) -> list:
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    return [(r["step"], r["position"], r["rollout_tokens"]) for r in records]


def assert_same_training(found: Path, expected: Path) -> None:
    assert rollout_tokens(found) == rollout_tokens(expected)
    for ours, theirs in zip(losses(found), losses(expected), strict=True):
        for name in ("loss_metrics/global_avg_loss", "refine/ntp_loss", "refine/pg_loss", "rollout/reward_mean", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (ours["step"], name)


@pytest.mark.parametrize(
    "family",
    ["delta_net", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gated_delta_net", "lact", "qwen3_5", "olmo_hybrid"))],
)
def test_ten_steps_are_those_of_the_native_engine(tmp_path, family):
    """Must show: from one seed checkpoint, argmax positions, greedy rollouts; every way of getting prefixes."""
    common = ["--model.name", family, *TEN_STEPS, *GREEDY]
    if family == "lact":
        common += ["--model.options", "newton_schulz_dtype=float32"]
    seed = tmp_path / "seed"
    assert_finished(train(seed, *common, "--checkpoint.create_seed_checkpoint"))
    common += ["--checkpoint.initial_load_path", str(seed / "checkpoint" / "step-0")]
    ways = ("handed_over", "cached")
    runs = [(tmp_path / prefixes, *common, *VLLM, "--rollout.prefixes", prefixes) for prefixes in ways]
    for result in train_side_by_side((tmp_path / "native", *common), *runs):
        assert_finished(result)
    for prefixes in ways:
        assert_same_training(tmp_path / prefixes, tmp_path / "native")
        records = [json.loads(line) for line in (tmp_path / prefixes / "metrics.jsonl").read_text().splitlines()]
        assert len(records) == 10 and all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in records)
        assert all((record["rollout/prefilled_tokens"] == 8) == (prefixes == "handed_over") for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", ["handed_over", "cached"])
def test_sampled_rollouts_are_the_native_engines_and_a_killed_run_goes_on_bitwise(tmp_path, prefixes):
    options = [*VLLM, "--rollout.prefixes", prefixes]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_finished(train(tmp_path / "native"))
    assert_finished(train(whole, *options))
    assert_same_training(whole, tmp_path / "native")
    assert train(killed, *options, fault="update:5").returncode == -signal.SIGKILL
    assert_finished(train(killed, *options))
    assert losses(killed) == losses(whole)
    assert (killed / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, overrides, message",
    [
        ("missing:0", [], "rollout.engine is 'vllm', but vllm is not installed; allowed without it: 'native'"),
        ("", ["--rollout.cache_gib", "1000"], "rollout.engine = 'vllm' does not fit beside the trainer: this machine has"),
        ("", ["--rollout.cache_gib", "1e-5"], "rollout.cache_gib is 1e-05, which holds 0 state(s)"),
        ("", ["--parallelism.data_parallel_replicate_degree", "2"], "parallelism.data_parallel_replicate_degree = 2"),
    ],
)
def test_run_that_cannot_have_its_engine_ends_before_it_starts(tmp_path, fault, overrides, message):
    refused = train(tmp_path, *VLLM, *overrides, fault=fault)
    assert refused.returncode == 1
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in refused.stderr, refused.stderr[-3000:]
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", ["handed_over", "cached"])
def test_sharded_trainer_on_two_ranks(tmp_path, prefixes):
    """FSDP2, one engine a rank, weights gathered and streamed."""
    common = ["--refine.num_mini_batches", "1", "--training.steps", "4", *GREEDY]
    assert_finished(train(tmp_path / "native", *common, ranks=2))
    assert_finished(train(tmp_path / "vllm", *common, *VLLM, "--rollout.prefixes", prefixes, ranks=2))
    assert_same_training(tmp_path / "vllm", tmp_path / "native")


@pytest.mark.slow
def test_bfloat16_engine_with_importance_weights(tmp_path):
    options = ["--rollout.dtype", "bfloat16", "--rollout.importance_ratio_cap", "2", "--training.steps", "3"]
    assert_finished(train(tmp_path, *VLLM, *options))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(1e-5 < record["rollout/logprob_gap_max"] < 0.25 for record in records)
    assert all(
        abs(record["rollout/importance_weight_mean"] - 1) < 0.05 and record["rollout/importance_weight_mean"] != 1 for record in records
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("engine", "the vLLM engine failed in generate (weights version 4): ZeroDivisionError: division by zero"),
        slow("sync", "the vLLM engine could not take the weights (version 4): RuntimeError: connection lost"),
        slow("shape", "norm.weight has shape (3,) in the trainer, (256,) in the engine"),
        slow("nan", "norm.weight has values that are not finite (weights version 4)"),
        slow("gap", "rollouts of weights version 4 have log-probabilities further from the trainer's than rollout.max_logprob_gap"),
    ],
)
def test_broken_engine_ends_the_run_with_one_error_and_the_last_checkpoint_intact(tmp_path, fault, message):
    options = [*VLLM, "--rollout.prefixes", "cached"]
    if fault in ("sync", "shape"):
        options += ["--rollout.dtype", "bfloat16"]  # where something is copied
    broken = train(tmp_path, *options, fault=f"{fault}:3")
    assert broken.returncode == 1
    errors = [line for line in broken.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0], broken.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-2"]
    if fault != "engine":  # one fault is enough for the fast tests
        resumed = train(tmp_path, *options)
        assert_finished(resumed)
        assert "Training starts at step 3" in resumed.stdout


def session_members(session: int) -> list[int]:
    """Processes of a session that are alive (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("fault", ["rank:3", pytest.param("lost:3", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_others_within_a_minute(tmp_path, fault):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        "-m",
        "tests.integration_tests.fault_injection",
        fault,
        "--job.config_file",
        str(TINY),
        "--job.dump_folder",
        str(tmp_path),
        "--refine.num_mini_batches",
        "1",
        *VLLM,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=out, start_new_session=True)
        while "step 2/6" not in log.read_text() and process.poll() is None:
            time.sleep(0.2)
        begin = time.monotonic()
        assert process.wait(timeout=120) != 0
    assert time.monotonic() - begin < 60
    if fault.startswith("rank"):
        assert "error on rank 1: this rank has had enough" in log.read_text()
    assert session_members(process.pid) == []
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-2"]
