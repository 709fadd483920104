"""The benchmarks of rollouts and layouts run as they are documented, on a small model; `test_gpu_acceptance.py` runs that of a step."""

import json
import os
import subprocess
import sys

import pytest

from tests.integration_tests.runs import REPOSITORY


def benchmark(tool: str, *arguments: str, config: str = "tests/assets/tiny.toml") -> dict | list:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"tools/{tool}.py", config, *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    return json.loads("\n".join(lines[next(i for i, line in enumerate(lines) if line in ("{", "[")) :]))


@pytest.mark.slow
def test_rollouts_of_vllm_beside_native_ones():
    settings = ("--rollout.prefixes", "cached", "--refine.temperature", "0", "--refine.num_mini_batches", "1")
    found = benchmark("benchmark_rollouts", "--repeats", "1", *settings)
    assert found["seconds"].keys() == {"native", "cached", "handed_over", "recomputed"} and found["prefill_ratio"] < 1.2


@pytest.mark.slow
def test_context_beside_data_parallelism():
    settings = ("--tokens", "512", "--repeats", "1", "--degrees", "2")
    [found] = benchmark("benchmark_context_parallel", *settings, config="train_configs/debug_midtrain.toml")
    assert found["degree"] == 2 and found["ntp"]["context_over_data_parallel"] > 0 and found["refine"]["context_over_data_parallel"] > 0
