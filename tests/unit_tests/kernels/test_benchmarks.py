"""The operators' benchmark runs, its memory agrees with the committed baseline, and it names differences."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "kernels" / "benchmarks"
BASELINE = BENCHMARKS / "operators_cpu.json"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("operators_benchmark", BENCHMARKS / "operators.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_is_that_of_the_baseline():
    """One thread, another number than the baseline's: the script then does not compare times, which need a quiet machine."""
    command = [sys.executable, BENCHMARKS / "operators.py", "--repeats", "1", "--baseline", BASELINE]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "times were not compared: another" in result.stderr and "threads" in result.stderr
    assert json.loads(result.stdout)["operators"].keys() == json.loads(BASELINE.read_text())["operators"].keys()


def test_differences_beyond_the_tolerances_are_named(benchmark):
    baseline = json.loads(BASELINE.read_text())
    assert benchmark.differences(copy.deepcopy(baseline), baseline) == ([], None)
    found = copy.deepcopy(baseline)
    found["operators"]["lact"]["peak_bytes"] = round(1.02 * found["operators"]["lact"]["peak_bytes"])
    found["operators"]["short_conv"]["time_ratio"] *= 1.2
    found["operators"]["delta_rule"]["time_ratio"] *= 1.1
    del found["operators"]["linear_head"]
    wrong, reason = benchmark.differences(found, baseline)
    assert reason is None and [line.split(" ")[0] for line in wrong] == ["lact:", "linear_head:", "short_conv:"]
    found["torch"] = "another"
    wrong, reason = benchmark.differences(found, baseline)
    assert [line.split(" ")[0] for line in wrong] == ["lact:", "linear_head:"] and "another torch" in reason
