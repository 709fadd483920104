"""Runs two real steps of a job and prints, as JSON, the peak of what the second allocates, by torch's profiler. One process or
several under torchrun."""

import json
import os
import sys
import tempfile

import refine_titan  # noqa: F401  # isort: skip
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from refine_titan.distributed.loopback import rank_environment
from refine_titan.monitoring.curves import build_curves_processor
from refine_titan.registration import register_models
from refine_titan.trainer import RefineTrainer
from refine_titan.validation import load_config


def peak_bytes(profiler: profile) -> int:
    """Highest sum of allocations and frees since the profiler began."""
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def main(args: list[str]) -> None:
    with rank_environment(), tempfile.TemporaryDirectory() as folder:
        no_files = ["--job.dump_folder", folder, "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
        config = load_config([*args, *no_files])
        register_models(build_processor=build_curves_processor)
        trainer = RefineTrainer(config)
        trainer.monitor.begin(None)
        trainer.step = 1
        data = iter(trainer.dataloader)
        steps = [[next(data) for _ in range(trainer.gradient_accumulation_steps)] for _ in range(2)]
        trainer.train_step(iter(steps[0]))  # makes the optimizer's moments
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train_step(iter(steps[1]))
        if os.environ["RANK"] == "0":
            print(json.dumps({"peak": peak_bytes(profiler)}))
        trainer.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
