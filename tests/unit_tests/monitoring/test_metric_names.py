"""Metrics have one name each, in files and documents, and lines with earlier names are read as well."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchtitan.components.metrics import DeviceMemStats

from refine_titan.config.sections import Refine
from refine_titan.files.json_lines import DamagedLines
from refine_titan.monitoring.metric_names import EARLIER_NAMES, earlier_name, read_metrics, validation_name
from refine_titan.monitoring.run_monitor import memory_metrics
from refine_titan.monitoring.step_metrics import SUMS, StepMetrics
from refine_titan.report.training_sections import CURVES
from refine_titan.reproduction.measures import CURVES as ARM_CURVES

PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")


def step_metrics(outer: str = "") -> StepMetrics:
    """A step with one of everything."""
    metrics = StepMetrics()
    metrics.sums = {name: 4.0 for name in SUMS} | {"answers": 4.0 if outer == "reward" else 0.0}
    metrics.grad_norms, metrics.outer_grad_norms = [1.0], [2.0] if outer else []
    with metrics.stage("score"):
        pass
    return metrics


def written(outer: str = "") -> dict:
    return step_metrics(outer).result(Refine(), None)


def test_earlier_lines_are_read_beside_present_ones(tmp_path):
    """A run that goes on has both in one file."""
    lines = [
        {"step": 1, "loss": 3.5, "ntp_loss": 3.0, "pg_loss": None, "seconds": {"score": 0.5, "total": 2.0}},
        {"step": 2, "ntp_loss": None, "seconds": None},
        {"step": 3, "loss_metrics/global_avg_loss": 2.5, "refine/ntp_loss": 2.0, "timing/score": 0.25, "timing/total": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "refine/ntp_loss": "low"}\n')
    damaged = DamagedLines(path)
    names = ["loss_metrics/global_avg_loss", "refine/ntp_loss", "refine/pg_loss", "timing/score", "timing/total"]
    columns = read_metrics(path, names, damaged)
    found = [columns[name].tolist() for name in ("step", *names)]
    nan = math.nan
    expected = [[1, 2, 3], [3.5, nan, 2.5], [3, nan, 2], [nan] * 3, [0.5, nan, 0.25], [2, nan, 1]]
    np.testing.assert_array_equal(found, expected)
    assert damaged.numbers == [4]


def test_every_metric_that_is_read_is_written():
    names = {*written("sft"), *written("reward"), "grad_norm"}
    assert {name for name, *_ in CURVES} | ARM_CURVES.keys() <= names
    renamed = {name for name in EARLIER_NAMES if name not in ("lr", "tflops", "memory/max_active(GiB)", "refine/weight_version")}
    assert renamed <= names


def test_page_names_every_metric_and_its_earlier_name():
    metrics, earlier = PAGE.split("## Names of earlier lines")
    named = set(re.findall(r"`([\w/%()]+)`", metrics))
    for name in {*written("sft"), *written("reward"), *EARLIER_NAMES}:
        assert name in named, name
    table = [row for row in earlier.splitlines() if row.startswith("| `")]
    for name in EARLIER_NAMES:
        [row] = [row for row in table if f"`{earlier_name(name)}`" in row.split("|")[1]]
        new = row.split("|")[2]
        assert f"`{name}`" in new or f"`{name.split('/')[0]}/` and the same name" in new, name
    assert earlier_name("timing/score") == "seconds.score" and earlier_name("grad_norm") is None


def test_memory_has_the_names_of_torchtitan():
    stats = DeviceMemStats(1.23456, 10.0, 2.0, 20.0, 0, 0)
    assert memory_metrics(stats) == {
        "memory/max_active(GiB)": 1.2346,
        "memory/max_active(%)": 10.0,
        "memory/max_reserved(GiB)": 2.0,
        "memory/max_reserved(%)": 20.0,
    }


def test_loss_is_that_of_its_parts():
    refine = replace(Refine(), ntp_coef=0.5, rl_coef=0.25, kl_coef=0.1, entropy_coef=0.01)
    metrics = step_metrics()
    metrics.sums |= {"nll": 8.0, "policy_loss": 2.0, "kl_penalty": 1.0, "rollout_entropy": 6.0}
    result = metrics.result(refine, None)
    assert result["loss_metrics/global_avg_loss"] == pytest.approx(0.5 * 2.0 + 0.25 * 0.5 + 0.1 * 0.25 - 0.01 * 1.5)
    assert result["loss_metrics/global_max_loss"] == result["loss_metrics/global_avg_loss"]
    assert result["refine/ntp_loss"] == 2.0 and result["refine/pg_loss"] == 0.5 and result["rollout/entropy"] == 1.5


@pytest.mark.parametrize("outer", ["sft", "reward"])
def test_loss_of_post_training_without_inner_steps_is_that_of_the_answers(outer):
    metrics = step_metrics(outer)
    metrics.sums |= dict.fromkeys(("labels", "nll", "rollouts", "policy_tokens", "rollout_tokens"), 0.0)
    metrics.grad_norms = []
    result = metrics.result(Refine(), None)
    assert result["loss_metrics/global_avg_loss"] == 1.0 and result["grad_norm"] == 2.0
    assert result["refine/ntp_loss"] is None and result["rollout/reward_mean"] is None and result["rollout/logprob_gap_max"] is None


def test_earlier_evaluations_have_their_loss_under_its_name():
    earlier = ["perplexity/512", "ruler/vt/1024", "seconds", "validation_metrics/loss", "timing/validation"]
    present = [
        "validation_metrics/loss",
        "validation_metrics/ruler/vt/1024",
        "timing/validation",
        "validation_metrics/loss",
        "timing/validation",
    ]
    assert [validation_name(name) for name in earlier] == present
