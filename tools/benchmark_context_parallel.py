"""Compares context parallelism with data parallelism: tokens per second and rank, and the bytes that collectives move.

    python tools/benchmark_context_parallel.py CONFIG.toml [--degrees 1,2,4] [--tokens 2048] [--repeats N] [--section.key value ...]

For every degree n, n processes train in turns on one shared sequence of n * TOKENS tokens (context parallel) and on one sequence of
TOKENS tokens each (data parallel, FSDP2). The number of processes, and the tokens and rollouts of a rank, are the same in both, so that
the difference is the cost of sharding a sequence. Prints JSON: for each degree, tokens per second and rank of both, their ratio (median
over rounds), the peak memory of rank n - 1, and, for one training step and each kind of collective, the number of calls and the bytes
that rank n - 1 puts into them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module
from trainer_benchmark import build_trainer, describe

from refine_titan.registration import register_models
from refine_titan.validation import load_config

TIMED_STEPS = 3
REPOSITORY = Path(__file__).parents[1]


class CountCollectives(TorchDispatchMode):
    """Counts the calls of collectives, and the bytes of the tensors that this rank puts into them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and function._schema.name.partition("::")[2] not in ("recv_", "barrier", "monitored_barrier_"):
            name = function._schema.name.partition("::")[2].strip("_")
            # Gathers and scatters take their output first, then their input; the others take one list of tensors.
            inputs = args[1] if "gather" in name or "scatter" in name else args[0]
            self.calls[name] += 1
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def work(arguments: list[str], result: Path) -> None:
    """Trains a few steps in one of the processes; the last rank writes its measurements to `result`."""
    logger.disabled = True
    config = load_config(arguments)
    register_models()
    trainer = build_trainer(config)
    trainer.step = 1
    data = iter(trainer.dataloader)
    batches = [next(data) for _ in range(trainer.gradient_accumulation_steps)]

    def timed_step(objective: str) -> float:
        trainer.job_config.refine.objective = objective
        dist.barrier()
        device_module.synchronize()
        begin = time.perf_counter()
        trainer.train_step(iter(batches))
        device_module.synchronize()
        return time.perf_counter() - begin

    seconds, collectives = {}, {}
    for objective in ("ntp", "refine"):
        timed_step(objective)
        with CountCollectives() as counted:
            timed_step(objective)
        collectives[objective] = {name: [counted.calls[name], counted.bytes[name]] for name in sorted(counted.calls)}
        seconds[objective] = statistics.median(timed_step(objective) for _ in range(TIMED_STEPS))
    peak = device_module.memory_stats(trainer.device)["active_bytes.all.peak"]
    if dist.get_rank() == dist.get_world_size() - 1:
        found = {"seconds": seconds, "collectives": collectives, "peak_bytes": peak}
        result.write_text(json.dumps(found | describe(config)))
    trainer.close()
    dist.destroy_process_group()


def launch(config: str, overrides: list[str], processes: int) -> dict:
    """Runs `work` in several processes and returns the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        no_files = ["--job.dump_folder", folder, "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
        command = [
            sys.executable,
            "-m",
            "refine_titan.launch",
            f"--nproc_per_node={processes}",
            "--rdzv-backend=loopback",
            __file__,
            "--worker",
            str(result),
            "--job.config_file",
            config,
            *overrides,
            *no_files,
        ]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
        if finished.returncode:
            sys.exit(finished.stderr[-3000:])
        return json.loads(result.read_text())


def compare(config: str, overrides: list[str], degree: int, tokens: int, repeats: int) -> dict:
    chunks = load_config(["--job.config_file", config, *overrides]).refine.num_chunks
    common = [*overrides, "--refine.num_mini_batches", "1", "--training.local_batch_size", "1"]
    layouts = {
        "data_parallel": ["--training.seq_len", str(tokens), "--training.global_batch_size", str(degree)],
        "context_parallel": [
            "--training.seq_len",
            str(tokens * degree),
            "--training.global_batch_size",
            "1",
            "--refine.num_chunks",
            str(chunks * degree),
            "--parallelism.context_parallel_degree",
            str(degree),
        ],
    }
    rounds = [{name: launch(config, [*common, *layout], degree) for name, layout in layouts.items()} for _ in range(repeats)]
    found = {"degree": degree}
    for objective in ("ntp", "refine"):
        ratios = [r["data_parallel"]["seconds"][objective] / r["context_parallel"]["seconds"][objective] for r in rounds]
        speeds = {name: statistics.median(tokens / r[name]["seconds"][objective] for r in rounds) for name in layouts}
        found[objective] = {
            "tokens_per_second_and_rank": {name: round(speed, 1) for name, speed in speeds.items()},
            "context_over_data_parallel": round(statistics.median(ratios), 3),
            "of_each_round": [round(ratio, 3) for ratio in ratios],
            "calls_and_bytes": {name: rounds[0][name]["collectives"][objective] for name in layouts},
        }
    found["peak_bytes"] = {name: statistics.median(r[name]["peak_bytes"] for r in rounds) for name in layouts}
    kept = ("model", "device", "versions")
    return found | {name: rounds[0]["context_parallel"][name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    parser.add_argument("--degrees", default="1,2,4", help="context-parallel degrees (1,2,4)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per rank (2048)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    arguments, overrides = parser.parse_known_args()
    degrees = [int(degree) for degree in arguments.degrees.split(",")]
    found = [compare(arguments.config, overrides, degree, arguments.tokens, arguments.repeats) for degree in degrees]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
