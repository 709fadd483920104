"""Checks the memory that converting takes, as the benchmark measures it."""

import json
import subprocess
import sys

import pytest

from tests.checkpoints import TOOL


@pytest.mark.slow
def test_memory_stays_below_the_weights(tmp_path):
    # To DCP one tensor is in memory at a time; to Hugging Face one shard, which here holds all weights.
    command = [sys.executable, str(TOOL.with_name("benchmark_conversion.py")), "--flavor", "340M", "--folder", str(tmp_path)]
    result = subprocess.run([*command, "--limit-mb", "1000"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["bitwise"] and report["from_hf"]["peak_above_baseline_mb"] < 0.5 * report["weights_bytes"] / 1e6
    assert list(tmp_path.iterdir()) == []
