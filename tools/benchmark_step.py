"""Measures the ratio of a ReFINE step to a next-token step on the same tokens, in time and in peak memory.

    python tools/benchmark_step.py CONFIG.toml [--repeats N] [--section.key value ...]

Builds the run's own trainer (no checkpoint is read or written), then alternates steps with `objective = "ntp"` and `"refine"` on the
same batch, so that a slow moment of the machine affects both. Prints JSON: `time_ratio` (the median over rounds of refine / ntp),
`memory_ratio` (of the peaks, each less what the process held before the model was built), the values from which both are computed, tokens
per second, and on a GPU the share of its peak operations (`mfu`).
Before timing it checks that both steps give a finite gradient.
"""

import gc
import math
import statistics
import sys
import time

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from torchtitan.tools.utils import device_module
from trainer_benchmark import build_trainer, describe, run

from refine_titan.distributed.device import release_free_memory, resident_bytes
from refine_titan.errors import UserError
from refine_titan.trainer import RefineTrainer


def held_bytes() -> int:
    """Bytes in use: those of the GPU's allocator, or the resident memory of the process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def run_step(trainer: RefineTrainer, objective: str, batches: list) -> dict[str, float]:
    """Runs one training step; returns its seconds, its CPU seconds (of all threads), its peak bytes and its seconds by stage."""
    device_module.reset_peak_memory_stats()
    trainer.job_config.refine.objective = objective
    device_module.synchronize()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    trainer.train_step(iter(batches))
    device_module.synchronize()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    peak = device_module.memory_stats(trainer.device)["active_bytes.all.peak"]
    norms = trainer.monitor.metrics.grad_norms
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise UserError(f"the {objective} step gave gradient norms {norms}: nothing to time")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "stages": dict(trainer.monitor.metrics.seconds)}


def benchmark(config, repeats: int) -> dict:
    base = held_bytes()
    trainer = build_trainer(config)
    trainer.step = 1
    data = iter(trainer.dataloader)
    batches = [next(data) for _ in range(trainer.gradient_accumulation_steps)]
    for objective in ("ntp", "refine"):
        run_step(trainer, objective, batches)
    # Each objective goes first in every second round, because the step before a step influences its time.
    orders = [("ntp", "refine"), ("refine", "ntp")]
    rounds = [{o: run_step(trainer, o, batches) for o in orders[i % 2]} for i in range(repeats)]
    peaks = {}
    for objective in ("ntp", "refine"):
        # Memory is measured in separate steps: the release makes the next step slow, but without it the peak would include what the
        # allocator kept from the steps before.
        gc.collect()
        release_free_memory()
        peaks[objective] = run_step(trainer, objective, batches)["peak_bytes"]
    processor, tokens = trainer.metrics_processor, len(batches) * config.training.local_batch_size * config.training.seq_len
    trainer.close()

    times = {o: [r[o]["seconds"] for r in rounds] for o in ("ntp", "refine")}
    ratios = [refine / ntp for refine, ntp in zip(times["refine"], times["ntp"])]
    stages = {name: statistics.median(r["refine"]["stages"][name] for r in rounds) for name in rounds[0]["refine"]["stages"]}
    speed = {o: tokens / statistics.median(times[o]) for o in times}
    peak_flops = processor.gpu_peak_flops if torch.cuda.is_available() else None
    return {
        "time_ratio": round(statistics.median(ratios), 4),
        "memory_ratio": round((peaks["refine"] - base) / (peaks["ntp"] - base), 4),
        "time_ratio_of_each_round": [round(ratio, 4) for ratio in ratios],
        "ntp_seconds": round(statistics.median(times["ntp"]), 4),
        "refine_seconds": round(statistics.median(times["refine"]), 4),
        **{f"{o}_tokens_per_second": round(speed[o], 1) for o in speed},
        **{f"{o}_mfu": peak_flops and round(speed[o] * processor.num_flops_per_token / peak_flops, 4) for o in speed},
        **{f"{o}_cpu_seconds": round(statistics.median(r[o]["cpu_seconds"] for r in rounds), 4) for o in ("ntp", "refine")},
        "refine_seconds_by_stage": {name: round(seconds, 4) for name, seconds in stages.items()},
        "bytes_before_the_model": base,
        "ntp_peak_bytes": peaks["ntp"],
        "refine_peak_bytes": peaks["refine"],
        "sequences": len(batches) * config.training.local_batch_size,
        "num_mini_batches": config.refine.num_mini_batches,
        "scoring_pass": "training" if config.refine.scores_in_training_pass(config.refine.num_mini_batches) else "separate",
        **describe(config),
    }


if __name__ == "__main__":
    sys.exit(run(benchmark, __doc__, repeats=8))
