"""Starts real training processes and reads what they write."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"
# Everything about a step that must repeat to the last bit; times and memory are left out.
LOSSES = (
    "step",
    "loss_metrics/global_avg_loss",
    "refine/ntp_loss",
    "refine/pg_loss",
    "rollout/reward_mean",
    "rollout/reward_hybrid_mean",
    "rollout/match_mean",
    "refine/advantage_std",
    "refine/clip_fraction",
    "grad_norm",
    "rollout/logprob_gap",
)


def train(
    folder: Path, *overrides: str, config: Path = TINY, fault: str = "", ranks: int = 1, threads: int = 2
) -> subprocess.CompletedProcess:
    """Runs a job in `folder` to its end, or until the fault of `fault_injection.py` kills it."""
    module = ["-m", "tests.integration_tests.fault_injection", fault] if fault else ["-m", "refine_titan.train"]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [*launcher, *module, "--job.config_file", str(config), "--job.dump_folder", str(folder), *overrides]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # gloo finds its own address without looking up the host's name, which test machines may not resolve.
    environment |= {"OMP_NUM_THREADS": "1" if ranks > 1 else str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def train_side_by_side(*runs: tuple) -> list[subprocess.CompletedProcess]:
    """Runs of one process and thread each, two at a time; each run is the arguments of `train`."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda run: train(*run, threads=1), runs))


def losses(folder: Path) -> list[dict]:
    """The repeatable part of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in LOSSES} for line in lines]


def assert_finished(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
