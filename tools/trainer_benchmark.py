"""Code that the benchmarks of a run's own trainer share: the command line, a trainer that writes no files, and its description."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable

import torch
from torchtitan.tools.logging import logger

from refine_titan.commands.ends import run_to_end
from refine_titan.config.batch_plan import plan_batch
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.loopback import rank_environment
from refine_titan.errors import UsageError
from refine_titan.estimation.checkpointing_choice import choose_checkpointing
from refine_titan.monitoring.run_folder import versions
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.registration import register_models
from refine_titan.trainer import RefineTrainer
from refine_titan.validation import load_config


class Silent:
    """Replaces the run monitor, because a benchmark writes no files; keeps the metrics of the last step."""

    metrics: StepMetrics

    def record_rollouts(self, *_):
        pass

    def log_step(self, step, metrics, *_):
        self.metrics = metrics

    def close(self):
        pass


def build_trainer(config: JobConfig) -> RefineTrainer:
    """Builds the run's trainer with random weights; it writes no files."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    plan_batch(config, num_ranks)
    trainer = RefineTrainer(choose_checkpointing(config, num_ranks).config)
    trainer.monitor = trainer.refine_step.recorder = Silent()
    return trainer


def describe(config: JobConfig) -> dict:
    """The model, sizes, device and versions for which a measurement holds."""
    return {
        "model": f"{config.model.name} {config.model.flavor}",
        "seq_len": config.training.seq_len,
        "num_chunks": config.refine.num_chunks,
        "rollout_length": config.refine.rollout_length,
        "rollouts_per_position": config.refine.rollouts_per_position,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(),
    }


def run(benchmark: Callable[[JobConfig, int], dict], description: str, repeats: int, settings: tuple[str, ...] = ()) -> int:
    """Parses the command line, runs `benchmark(config, repeats)` and prints its result as JSON; returns the exit status.

    Args:
        description: the tool's docstring.
        repeats: default of `--repeats`.
        settings: settings of the job that the benchmark fixes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds ({repeats})")
    arguments, overrides = parser.parse_known_args()
    logger.disabled = True

    def work() -> int:
        if arguments.repeats < 1:
            raise UsageError(f"--repeats is {arguments.repeats}; allowed: at least 1")
        with rank_environment(), tempfile.TemporaryDirectory() as folder:
            no_files = ["--job.dump_folder", folder, "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
            config = load_config(["--job.config_file", arguments.config, *overrides, *no_files, *settings])
            register_models()
            print(json.dumps(benchmark(config, arguments.repeats), indent=1))
        return 0

    try:
        return run_to_end(work, lambda: "Interrupted.")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
