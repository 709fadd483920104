"""Evaluations as a user runs them, by the command line: killed and interrupted, on real data, and during training."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_titan.models import FAMILIES
from tests.checkpoints import random_weights, write_hf_folder
from tests.here import command_here
from tests.integration_tests.runs import REPOSITORY, TINY, assert_finished, losses, train

SLOW = pytest.mark.slow
DATA = Path(__file__).parents[3] / "shared" / "data"
TIMES = ("seconds", "adaptation_seconds")
EVALUATE = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py")]
ENVIRONMENT = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    args = FAMILIES["delta_net"].flavors["debug"]
    return write_hf_folder(tmp_path_factory.mktemp("checkpoint") / "hf", args, random_weights(args))


def start(*arguments) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([*EVALUATE, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, cwd=REPOSITORY)


def run(*arguments) -> subprocess.CompletedProcess:
    process = start(*arguments)
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def samples(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def stop_at(process: subprocess.Popen, folder: Path, lines: int, number: signal.Signals) -> None:
    """Sends a signal once `lines` samples are on disk."""
    path, end = folder / "samples.jsonl", time.monotonic() + 300
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)


def start_ranks(*arguments) -> subprocess.Popen:
    """Two ranks, as run_evaluate.sh starts them."""
    options = ["--nproc-per-node=2", "--rdzv-backend=loopback"]
    command = [sys.executable, "-m", "refine_titan.launch", *options, *EVALUATE[1:], *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=REPOSITORY, start_new_session=True, **output)


@pytest.fixture(scope="module")
def adapting(checkpoint, tmp_path_factory) -> list:
    """Arguments of an evaluation with test-time training and perplexity; two prompts are too short to adapt to."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [{"prompt": f"Question {i}: {'what ' * (4 * i)}?", "answers": [f"{i}"], "max_new_tokens": 6} for i in range(9)]
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"refine.phase": "ttt", "ttt.steps": 1, "optimizer.lr": 0.01, "refine.num_chunks": 2, "refine.num_mini_batches": 1}
    settings |= {"refine.reward": "binary", "evaluation.perplexity_source": "python-stdlib", "evaluation.perplexity_tokens": 600}
    overrides = [part for name, value in settings.items() for part in (f"--{name}", value)]
    tasks = ["--tasks", folder / "hotpotqa.jsonl", "perplexity", "--num-samples", 9]
    return ["run", TINY, "--checkpoint", checkpoint, *tasks, *overrides]


@pytest.fixture(scope="module")
def by_one_rank(adapting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(*adapting, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_two_ranks_resume_the_evaluation_of_one_and_give_its_samples(adapting, by_one_rank, tmp_path):
    """Two ranks go on after seven samples of one rank; every sample adapts by itself."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes((by_one_rank / "run.json").read_bytes())
    lines = (by_one_rank / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[2:9]) + lines[9][:20])
    process = start_ranks(*adapting, "--output", folder)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert "18/18 samples" in output and output.count("Results: ") == 1
    after = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert after[2:9] == lines[2:9]  # equal times show that these were not run again
    assert samples(folder) == samples(by_one_rank) and any(line.get("adaptation", {}).get("optimizer_steps") for line in samples(folder))
    found, expected = (json.loads((path / "results.json").read_text()) for path in (folder, by_one_rank))
    assert found["samples_sha256"] == expected["samples_sha256"] and found["averages"] == expected["averages"]


@SLOW
@pytest.mark.parametrize("fate", ["lost", "stopped"])
def test_evaluation_of_two_ranks_that_is_ended_goes_on_with_one(adapting, by_one_rank, tmp_path, fate):
    process = start_ranks(*adapting, "--output", tmp_path / "run")
    stop_at(process, tmp_path / "run", 3, signal.SIGCONT if fate == "lost" else signal.SIGTERM)
    if fate == "lost":
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
        victim = max(map(int, children.stdout.split()))
        os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    if fate == "lost":
        assert process.returncode == 1 and f"process {victim}) was killed by SIGKILL" in errors
    else:
        assert process.returncode == 75 and "Stopped on request; finished samples are in" in errors
    before = (tmp_path / "run" / "samples.jsonl").read_bytes().splitlines()
    assert 3 <= len(before) < 18
    last = run(*adapting, "--output", tmp_path / "run")
    assert last.returncode == 0, last.stderr
    assert set(before) <= set((tmp_path / "run" / "samples.jsonl").read_bytes().splitlines())
    assert samples(tmp_path / "run") == samples(by_one_rank)


@SLOW
def test_ranks_refuse_to_carry_weights_over(adapting, tmp_path):
    process = start_ranks(*adapting, "--ttt.carry_over", "--output", tmp_path / "run")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "ttt.carry_over is true, and 2 ranks share the evaluation" in errors


@SLOW
def test_killed_evaluation_goes_on_and_results_are_equal(checkpoint, tmp_path):
    """The evaluation is ended by SIGKILL, resumed, ended by Ctrl-C, and resumed to the end."""
    common = [
        "run",
        TINY,
        "--checkpoint",
        checkpoint,
        "--tasks",
        "niah",
        "perplexity",
        "--lengths",
        "1024",
        "--num-samples",
        "2",
        "--batch-size",
        "2",
        "--evaluation.perplexity_source",
        "python-stdlib",
    ]
    whole = run(*common, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = start(*common, "--output", tmp_path / "run")
    stop_at(process, tmp_path / "run", 4, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "results.json").exists()
    killed_at = len((tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    process = start(*common, "--output", tmp_path / "run")
    stop_at(process, tmp_path / "run", killed_at + 4, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in errors and "Traceback" not in errors
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert killed_at < before.count(b"\n") < 18
    last = run(*common, "--output", tmp_path / "run")
    assert last.returncode == 0, last.stderr
    assert (tmp_path / "run" / "samples.jsonl").read_bytes().startswith(before)  # equal times show that no sample was run again
    assert samples(tmp_path / "run") == samples(tmp_path / "whole") and len(samples(tmp_path / "run")) == 18
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert found["samples_sha256"] == expected["samples_sha256"] and found["averages"] == expected["averages"]


def test_command_line_names_what_is_wrong(tmp_path):
    for arguments, message in (
        (["run", tmp_path / "none.toml", "--tasks", "niah"], f"error: --job.config_file: {tmp_path}/none.toml is not a file"),
        (["run", TINY, "--checkpoint", tmp_path / "none", "--tasks", "niah"], "error: --checkpoint is "),
    ):
        result = command_here("evaluate", *arguments)
        assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(message), result.stderr


@pytest.mark.skipif(not DATA.is_dir(), reason=f"evaluation data are not at {DATA}")
@pytest.mark.parametrize("phase", ["midtrain", "ttt"])
@SLOW
def test_every_data_file_runs_end_to_end(checkpoint, tmp_path, phase):
    files = sorted(DATA.rglob("*.parquet"))
    command = ["run", TINY, "--checkpoint", checkpoint, "--tasks", *files, "--num-samples", "2", "--training.seq_len", "2048"]
    result = run(*command, "--refine.phase", phase, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["tasks"]) == len(files) and all(row["num_samples"] == 2 for row in results["tasks"])
    if phase == "ttt":
        assert all(row["adaptation_seconds_per_sample"] > 0 for row in results["tasks"])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"evaluation data are not at {DATA}")
@SLOW
def test_vllm_gives_the_native_engines_answers(checkpoint, tmp_path):
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    command = ["run", TINY, "--checkpoint", checkpoint, "--tasks", "ruler/niah_single_1", "--lengths", "1024", "--num-samples", "6"]
    for engine in ("native", "vllm"):
        result = run(*command, "--engine", engine, "--output", tmp_path / engine)
        assert result.returncode == 0, result.stderr
    assert samples(tmp_path / "native") == samples(tmp_path / "vllm")


VALIDATION = (
    "--validation.enable",
    "--validation.at_start",
    "--validation.freq",
    "2",
    "--evaluation.tasks",
    "perplexity,ruler/niah_single_1",
    "--evaluation.lengths",
    "1024",
    "--evaluation.num_samples",
    "2",
    "--evaluation.perplexity_source",
    "python-stdlib",
)


@pytest.fixture(scope="module")
def validated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    assert_finished(train(folder, "--training.steps", "4", *VALIDATION, threads=1))
    return folder


def validation_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing/validation" and "memory" not in name} for line in lines]


@SLOW
def test_evaluation_during_training_leaves_training_as_it_is(validated, tmp_path):
    assert_finished(train(tmp_path, "--training.steps", "4", threads=1))
    assert losses(validated) == losses(tmp_path)
    records = validation_of(validated)
    assert [record["step"] for record in records] == [0, 1, 2, 4]
    first, last = ({name.removeprefix("validation_metrics/"): value for name, value in records[i].items()} for i in (0, -1))
    assert last["loss"] < first["loss"] and last["accuracy"] > first["accuracy"] and 0 <= first["ruler/niah_single_1/1024"] <= 1
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))


@SLOW
def test_evaluation_that_a_kill_prevented_runs_after_the_resume(validated, tmp_path):
    """The run is killed while it writes the checkpoint of step 4, and resumed from step 2, whose evaluation was lost."""
    killed = train(tmp_path, "--training.steps", "4", *VALIDATION, fault="checkpoint:4", threads=1)
    assert killed.returncode == -signal.SIGKILL
    lines = (tmp_path / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "validation.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    assert_finished(train(tmp_path, "--training.steps", "4", *VALIDATION, threads=1))
    assert validation_of(tmp_path) == validation_of(validated) and losses(tmp_path) == losses(validated)


@SLOW
@pytest.mark.parametrize("layout", [(), ("--parallelism.tensor_parallel_degree", "2"), ("--parallelism.context_parallel_degree", "2")])
def test_evaluation_that_two_ranks_share_is_that_of_one_rank(tmp_path, layout):
    settings = ("--training.steps", "2", "--data.num_streams", "2", "--refine.num_mini_batches", "1", *VALIDATION)
    settings = (*settings, "--evaluation.num_samples", "3", "--evaluation.batch_size", "2")
    assert_finished(train(tmp_path / "two", *settings, *layout, ranks=2, threads=1))
    assert_finished(train(tmp_path / "one", *settings, threads=1))
    for found, expected in zip(validation_of(tmp_path / "two"), validation_of(tmp_path / "one")):
        assert found == pytest.approx(expected, rel=1e-3)


@SLOW
def test_score_gives_the_scores_of_run(checkpoint, tmp_path):
    result = run(
        "run",
        TINY,
        "--checkpoint",
        checkpoint,
        "--tasks",
        "ruler/vt",
        "--lengths",
        "1024",
        "--num-samples",
        "3",
        "--protocol",
        "reference",
        "--output",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    scored = run("score", tmp_path / "run" / "samples.jsonl")
    assert scored.returncode == 0, scored.stderr
    assert [json.loads(line)["score"] for line in scored.stdout.splitlines()] == [line["score"] for line in samples(tmp_path / "run")]
