"""The reproduction as a user runs it, on untrained models: resumed after an interruption, and refused for wrong settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration_tests.runs import REPOSITORY, TINY

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
EVALUATION = '\n[evaluation]\ntasks = ["ruler/niah_single_1"]\nlengths = [1024]\nnum_samples = 2\n'


@pytest.fixture
def experiment(tmp_path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    text = Path(TINY).read_text()
    (folder / "start.toml").write_text(text.replace("[refine]", '[refine]\nobjective = "ntp"'))
    (folder / "continue.toml").write_text(text.replace("steps = 6", "steps = 4") + EVALUATION)
    return folder


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "tools/reproduce.py", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, cwd=REPOSITORY)


def run(*arguments) -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


@pytest.mark.slow
def test_interrupted_reproduction_goes_on_and_says_what_came_out(experiment, tmp_path):
    arguments = (experiment, "--seeds", "1", "2", "--output", tmp_path / "out", "--jobs", "2")
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out" / "tiny" / "ntp_seed_1" / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130 and "The same command goes on" in process.communicate()[1]
    folders = str(tmp_path / "out")
    assert folders not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout

    status, output, errors = run(*arguments)
    assert status == 0, errors + output
    assert "of 11 stages are done already" in output and "| ReFINE − next-token |" in output
    record = json.loads((tmp_path / "out" / "reproduction.json").read_text())["experiments"][0]
    assert record["columns"] == ["niah_single_1 1K", "mean"] and len(record["scores"]["refine"]["mean"]) == 2
    losses = [record["training"][arm]["ntp_loss"] for arm in ("ntp", "refine")]
    assert losses[0] != losses[1] and all(0 < loss < 6 for loss in losses)
    assert (tmp_path / "out" / "reproduction.md").read_text() in output

    again, output, _ = run(*arguments)
    assert again == 0 and "11 of 11 stages are done already" in output

    (experiment / "continue.toml").write_text((experiment / "continue.toml").read_text() + "# changed\n")
    status, _, errors = run(*arguments)
    assert status == 1 and errors.endswith("was begun with another continue.toml of " + f"{experiment}; choose another --output\n")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seeds", "1", "1"), "--seeds is [1, 1]; allowed: different numbers from 1"),
        (("--jobs", "0"), "--jobs is 0; allowed: at least 1"),
        (("nowhere",), "nowhere holds no start.toml and no continue.toml; an experiment is a folder with"),
    ],
)
def test_wrong_arguments_are_one_error(tmp_path, options, message):
    status, _, errors = run(*options, "--output", tmp_path / "out")
    assert status == 1 and message in errors and "Traceback" not in errors and not (tmp_path / "out").exists()


def test_wrong_setting_of_an_experiment_is_named(experiment, tmp_path):
    (experiment / "start.toml").write_text((experiment / "start.toml").read_text().replace("[refine]", '[refine]\nreward = "best"'))
    status, _, errors = run(experiment, "--seeds", "1", "--output", tmp_path / "out")
    assert status == 1 and "refine.reward" in errors and "Traceback" not in errors


def test_length_without_room_for_a_sample_is_found_before_the_training(experiment, tmp_path):
    (experiment / "continue.toml").write_text((experiment / "continue.toml").read_text().replace("[1024]", "[1024, 200]"))
    status, output, errors = run(experiment, "--seeds", "1", "2", "--output", tmp_path / "out")
    assert status == 1 and f"{experiment / 'continue.toml'}: [evaluation] with seed 1: " in errors and "lengths holds 200;" in errors
    assert "begins" not in output and "Traceback" not in errors and not (tmp_path / "out").exists()
