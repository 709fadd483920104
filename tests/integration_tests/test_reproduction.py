"""Experiments as a user runs them, on untrained models: resumed after an interruption, and refused for wrong settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.here import command_here
from tests.integration_tests.runs import REPOSITORY, TINY

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
EVALUATION = '\n[evaluation]\ntasks = ["ruler/niah_single_1"]\nlengths = [1024]\nnum_samples = 2\n'
ARMS = """
forks = [2, 6]
seeds = [1, 2]
baseline = "plain"
measures = ["ruler"]
primary = "ruler/mean"

[arms.plain]
settings = { refine.objective = "ntp" }

[arms.refine]
label = "ReFINE"
settings = { refine.objective = "refine" }

[arms.longer]
settings = { refine.objective = "ntp", training.steps = 5 }
"""


@pytest.fixture
def experiment(tmp_path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    text = Path(TINY).read_text()
    (folder / "start.toml").write_text(text.replace("[refine]", '[refine]\nobjective = "ntp"'))
    (folder / "continue.toml").write_text(text.replace("steps = 6", "steps = 4") + EVALUATION)
    (folder / "arms.toml").write_text(ARMS)
    return folder


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "tools/reproduce.py", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, cwd=REPOSITORY)


def run(*arguments) -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def refused(*arguments) -> tuple[int, str, str]:
    """An experiment that is refused before it begins, in this process."""
    result = command_here("reproduce", *arguments)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
def test_killed_experiment_goes_on_and_one_changed_arm_runs_alone(experiment, tmp_path):
    arguments = (experiment, "--output", tmp_path / "out", "--jobs", "2")
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out" / "tiny").glob("fork_2/refine_seed_1-*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130 and "The same command goes on" in process.communicate()[1]
    folders = str(tmp_path / "out")
    assert folders not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout

    status, output, errors = run(*arguments)
    assert status == 0, errors + output
    num_stages = 1 + 2 * 2 * (3 + 4)
    assert f"of {num_stages} stages are done already" in output and "Is “ReFINE” better than “plain” by ruler/mean?" in output
    record = json.loads((tmp_path / "out" / "reproduction.json").read_text())["experiments"][0]
    assert record["measures"] == ["ruler/mean", "ruler/niah_single_1 1K"] and len(record["values"]["6"]["refine"]["ruler/mean"]) == 2
    losses = [record["training"][fork][arm]["refine/ntp_loss"] for fork in ("2", "6") for arm in ("plain", "refine", "longer")]
    assert len(set(losses)) == 6 and all(0 < loss < 6 for loss in losses)
    assert [record["costs"]["2"][arm]["steps"] for arm in ("plain", "refine", "longer")] == [4, 4, 5]
    assert (tmp_path / "out" / "reproduction.md").read_text() in output
    for path in ("reproduction.html", "reproduction.tex", "tiny/figure.svg"):
        assert (tmp_path / "out" / path).stat().st_size > 1000

    again, output, _ = run(*arguments)
    assert again == 0 and f"{num_stages} of {num_stages} stages are done already" in output

    (experiment / "arms.toml").write_text(ARMS.replace("training.steps = 5", "training.steps = 3"))
    status, output, _ = run(*arguments, "--dry-run")
    to_run = [line.split()[2] for line in output.splitlines() if line.startswith("to run")]
    assert status == 0 and f"{num_stages - 8} of {num_stages} stages are done" in output
    assert len(to_run) == 8 and all("/longer_seed_" in name for name in to_run)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seeds", "1", "1"), "--seeds is [1, 1]; allowed: different numbers from 1"),
        (("--jobs", "0"), "--jobs is 0; allowed: at least 1"),
        (("--arms", "refin"), "--arms names 'refin'; did you mean 'refine'?"),
        (("--forks", "300"), "--forks names 300; "),
        (("nowhere",), "nowhere: no such folder of an experiment, and no such file of arms"),
    ],
)
def test_wrong_arguments_are_one_error(tmp_path, options, message):
    status, _, errors = refused(*options, "--output", tmp_path / "out")
    assert status == 1 and message in errors and "Traceback" not in errors and not (tmp_path / "out").exists()


def test_wrong_setting_of_an_experiment_is_named(experiment, tmp_path):
    (experiment / "start.toml").write_text((experiment / "start.toml").read_text().replace("[refine]", '[refine]\nreward = "best"'))
    status, _, errors = refused(experiment, "--seeds", "1", "--output", tmp_path / "out")
    assert status == 1 and "refine.reward" in errors and "Traceback" not in errors


def test_length_without_room_for_a_sample_is_found_before_the_training(experiment, tmp_path):
    (experiment / "continue.toml").write_text((experiment / "continue.toml").read_text().replace("[1024]", "[1024, 200]"))
    status, output, errors = refused(experiment, "--seeds", "1", "2", "--output", tmp_path / "out")
    assert status == 1 and f"{experiment / 'continue.toml'}: [evaluation] with seed 1: " in errors and "lengths holds 200;" in errors
    assert "begins" not in output and "Traceback" not in errors and not (tmp_path / "out").exists()
