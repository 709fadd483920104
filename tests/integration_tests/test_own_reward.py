"""Runs with rewards and selections of installed packages: the example's, and wrong ones, after which the folder still serves."""

import gc
import json
import sys

import pytest
from rapidfuzz.distance import Levenshtein

from refine_titan.train import main
from tests.integration_tests.runs import TINY
from tests.packages import install_example, write_package

# The reward is called once a microbatch, twice a step.
WRONG_REWARDS = """
import torch

calls = 0

def shaped(inputs):
    return torch.zeros(len(inputs.tokens_nk), 1)

def nan(inputs):
    return torch.full([len(inputs.tokens_nk)], float("nan"))

def crashing(inputs):
    global calls
    calls += 1
    return torch.tensor([len(text) / (5 - calls) for text in inputs.texts()])
"""


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Trains the tiny run in this process, with further settings; returns exit status, standard output and standard error."""

    def run(*overrides: str) -> tuple[int, str, str]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # so that monkeypatch restores whatever the run sets
            monkeypatch.delenv(name)
        capfd.readouterr()
        try:
            status = main(["--job.config_file", str(TINY), "--job.dump_folder", str(tmp_path / "run"), *overrides])
        finally:
            gc.enable()  # torchtitan's trainer switches it off
        return status, *capfd.readouterr()

    return run


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_example_package_trains(train, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(install_example(tmp_path_factory.mktemp("example")))
    learning = ["--optimizer.lr", "1e-2", "--refine.rollout_length", "12"]  # so that a few rollouts have a right character
    options = ["--training.steps", "3", "--checkpoint.no-enable", *learning]
    status, output, errors = train("--refine.reward", "edit_distance", "--refine.selection", "high_entropy", *options)
    assert status == 0, output + errors
    records, rollouts = lines_of(tmp_path / "run" / "metrics.jsonl"), lines_of(tmp_path / "run" / "rollouts.jsonl")
    assert len(records) == 3 and len(rollouts) == 24 and records[-1]["rollout/reward_std"] > 0
    for rollout in rollouts:
        assert rollout["reward"] == pytest.approx(Levenshtein.normalized_similarity(rollout["rollout"], rollout["truth"]))
    for record in records:
        of_step = [rollout["reward"] for rollout in rollouts if rollout["step"] == record["step"]]
        assert record["rollout/reward_mean"] == pytest.approx(sum(of_step) / 8)
        assert record["rollout/reward_binary_mean"] == pytest.approx(record["rollout/match_mean"])
        assert record["rollout/reward_hybrid_mean"] == pytest.approx(
            record["rollout/reward_cosine_mean"] + record["rollout/reward_binary_mean"]
        )
        assert -1 <= record["rollout/reward_cosine_mean"] <= 1 and record["grad_norm"] > 0
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["packages"]["edit-distance-reward"] == "0.1.0"


def test_run_goes_on_after_every_wrong_reward(train, tmp_path, monkeypatch):
    write_package(tmp_path, "wrong_rewards", WRONG_REWARDS, rewards={name: name for name in ("shaped", "nan", "crashing")})
    monkeypatch.syspath_prepend(tmp_path)
    for reward, message in (
        ("edit_distence", "refine.reward is 'edit_distence'; allowed: 'cosine', 'binary', 'hybrid' (built in), "),
        ("shaped", "refine.reward = 'shaped' of package wrong_rewards 1.0 returned a tensor [4, 1], torch.float32, on cpu; wanted is"),
        ("nan", "refine.reward = 'nan' of package wrong_rewards 1.0 returned nan for rollout 0, tokens ["),
    ):
        status, _, errors = train("--refine.reward", reward)
        assert status == 1 and "Traceback" not in errors and [*errors.splitlines()][-1].startswith(f"error: {message}"), errors
        assert errors.count("error: ") == 1
    assert lines_of(tmp_path / "run" / "metrics.jsonl") == []

    # A crash in step 3, after the checkpoint of step 2. Its traceback has no line of ours.
    status, _, errors = train("--refine.reward", "crashing", "--training.steps", "4")
    assert status == 1 and errors.count("error: ") == 1
    assert errors.splitlines()[-1] == (
        f"error: refine.reward = 'crashing' of package wrong_rewards 1.0 failed in line 15 of {tmp_path / 'wrong_rewards.py'} with "
        "ZeroDivisionError: division by zero"
    )
    files = [line for line in errors.splitlines() if line.strip().startswith("File ")]
    assert files and all("wrong_rewards.py" in line for line in files)
    before = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in before] == [1, 2]

    status, output, errors = train("--refine.reward", "binary", "--training.steps", "4")
    assert status == 0, output + errors
    assert "Training starts at step 3" in output and "refine.reward: 'crashing' -> 'binary'" in output + errors
    after = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert after[:2] == before and [record["step"] for record in after] == [1, 2, 3, 4]
    assert all(record["rollout/reward_mean"] == record["rollout/reward_binary_mean"] for record in after[2:])
    del sys.modules["wrong_rewards"]
