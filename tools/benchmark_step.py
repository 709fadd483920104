"""Time and peak memory of a ReFINE step over those of a next-token step on the same tokens, side by side in one process.

    python tools/benchmark_step.py CONFIG.toml [--repeats N] [--section.key value ...]

Builds the run's own trainer (no checkpoint is read or written), then alternates steps with `objective = "ntp"` and
`"refine"` on one and the same batch, so that a slow moment of the machine touches both. Prints JSON: `time_ratio` (median
over rounds of refine / ntp of the round), `memory_ratio` (peak over what the process held before the model was built),
and what they were computed from. Before it times, it checks that both steps give a finite gradient.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time

import refine_titan  # noqa: F401  announces the device before torchtitan is imported
import torch
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module

from refine_titan.config import load_config, plan_batch
from refine_titan.distributed.device import release_free_memory, resident_bytes
from refine_titan.errors import UserError
from refine_titan.monitoring.run_folder import versions
from refine_titan.registration import register_models
from refine_titan.train import single_process_environment
from refine_titan.trainer import RefineTrainer


class Silent:
    """Stands in for the run monitor: a benchmark writes no files."""

    def sample_rollouts(self, *_):
        pass

    def log_step(self, step, metrics, *_):
        self.metrics = metrics

    def close(self):
        pass


def held_bytes() -> int:
    """Memory in use: of the GPU's allocator, or resident in the process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def run_step(trainer: RefineTrainer, objective: str, batches: list) -> dict[str, float]:
    """One training step from the trainer's present weights; seconds, peak bytes, seconds by stage."""
    device_module.reset_peak_memory_stats()
    trainer.refine.objective = objective
    device_module.synchronize()
    begin = time.perf_counter()
    trainer.train_step(iter(batches))
    device_module.synchronize()
    seconds = time.perf_counter() - begin
    peak = device_module.memory_stats(trainer.device)["active_bytes.all.peak"]
    norms = trainer.monitor.metrics.grad_norms
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise UserError(f"the {objective} step gave gradient norms {norms}: nothing to time")
    return {"seconds": seconds, "peak_bytes": peak, "stages": dict(trainer.monitor.metrics.seconds)}


def benchmark(config, repeats: int) -> dict:
    plan_batch(config, num_ranks=1)
    base = held_bytes()
    trainer = RefineTrainer(config)
    trainer.monitor = Silent()
    trainer.step = 1
    data = iter(trainer.dataloader)
    batches = [next(data) for _ in range(trainer.gradient_accumulation_steps)]
    for objective in ("ntp", "refine"):
        run_step(trainer, objective, batches)
    # Each objective goes first in every other round: a step is slower or faster after another kind of step.
    orders = [("ntp", "refine"), ("refine", "ntp")]
    rounds = [{o: run_step(trainer, o, batches) for o in orders[i % 2]} for i in range(repeats)]
    peaks = {}
    for objective in ("ntp", "refine"):
        # Memory in steps of its own: the release makes the next step slow, and without it peaks show what the allocator
        # kept from the steps before.
        gc.collect()
        release_free_memory()
        peaks[objective] = run_step(trainer, objective, batches)["peak_bytes"]
    trainer.close()
    torch.distributed.destroy_process_group()

    times = {o: [r[o]["seconds"] for r in rounds] for o in ("ntp", "refine")}
    ratios = [refine / ntp for refine, ntp in zip(times["refine"], times["ntp"])]
    stages = {name: statistics.median(r["refine"]["stages"][name] for r in rounds) for name in rounds[0]["refine"]["stages"]}
    refine, training = config.refine, config.training
    return {
        "time_ratio": round(statistics.median(ratios), 4),
        "memory_ratio": round((peaks["refine"] - base) / (peaks["ntp"] - base), 4),
        "time_ratio_of_each_round": [round(ratio, 4) for ratio in ratios],
        "ntp_seconds": round(statistics.median(times["ntp"]), 4),
        "refine_seconds": round(statistics.median(times["refine"]), 4),
        "refine_seconds_by_stage": {name: round(seconds, 4) for name, seconds in stages.items()},
        "bytes_before_the_model": base,
        "ntp_peak_bytes": peaks["ntp"],
        "refine_peak_bytes": peaks["refine"],
        "model": f"{config.model.name} {config.model.flavor}",
        "sequences": len(batches) * training.local_batch_size,
        "seq_len": training.seq_len,
        "num_chunks": refine.num_chunks,
        "rollout_length": refine.rollout_length,
        "rollouts_per_position": refine.rollouts_per_position,
        "num_mini_batches": refine.num_mini_batches,
        "scoring_pass": "training" if trainer.scores_in_training_pass else "separate",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    parser.add_argument("--repeats", type=int, default=8, help="timed rounds (8)")
    arguments, overrides = parser.parse_known_args()
    logger.disabled = True
    single_process_environment()
    try:
        if arguments.repeats < 1:
            raise UserError(f"--repeats is {arguments.repeats}; allowed: at least 1")
        with tempfile.TemporaryDirectory() as folder:
            no_files = ["--job.dump_folder", folder, "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
            config = load_config(["--job.config_file", arguments.config, *overrides, *no_files])
            register_models()
            print(json.dumps(benchmark(config, arguments.repeats), indent=1))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
