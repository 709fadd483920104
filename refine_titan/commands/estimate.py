"""Estimates the memory that a rank of a run needs, without a GPU and without allocating it.

    refine-titan estimate CONFIG.toml [--section.key value ...] [--ranks N] [--device-memory GiB] [--reserve GiB] [--json]

Weights, gradients, optimizer and the engine's states are exact. What a step adds is counted by running the model's own operators on
tensors without data; docs/memory.md says how, and how accurate it is. Exit status: 0 if the run fits or the device's memory is unknown;
1 if it does not fit, with a setting that would make it fit, or if a setting is wrong; 2 for a wrong command line.
"""

import argparse
import json
import sys
import warnings
from dataclasses import asdict

from refine_titan.commands.ends import FAILED, run_to_end
from refine_titan.commands.options import Parser
from refine_titan.errors import UserError


def parser() -> Parser:
    result = Parser("refine-titan estimate", __doc__)
    result.add_argument("config", help="TOML file of a run")
    result.add_argument("--ranks", type=int, help="processes of the run (NGPU, or the product of its parallel degrees)")
    result.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="device whose operators are counted (gpu)")
    result.add_argument("--device-memory", type=float, help="memory of a device in GiB (that of this machine's GPU)")
    result.add_argument("--reserve", type=float, help="GiB of the device that the run may not use (4 on a GPU)")
    result.add_argument("--json", action="store_true", help="print bytes as JSON, for programs")
    return result


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, overrides = parser().parse(arguments, settings=True)
    return run_to_end(lambda: run(options, overrides), interrupted=lambda: "Interrupted.")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Reads the run's settings and estimates; returns the exit status."""
    from torchtitan.tools.logging import logger

    from refine_titan.registration import register_models
    from refine_titan.validation import load_config

    for name in ("ranks", "device_memory"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; allowed: above 0")
    logger.disabled = True
    try:
        with warnings.catch_warnings(action="ignore"):  # FSDP2 warns of views that change in place, which does not matter without data
            config = load_config([options.config, *overrides])
            register_models()
            return report(config, options)
    finally:
        logger.disabled = False


def report(config, arguments) -> int:
    """Prints the estimate; returns the exit status."""
    import torch

    from refine_titan.config.batch_plan import plan_batch
    from refine_titan.estimation.checkpointing_choice import CheckpointingChoice, choose_within, usable_memory
    from refine_titan.estimation.memory import GPU_RESERVE, change_that_fits, estimate_memory, table
    from refine_titan.estimation.virtual_ranks import ranks_of
    from refine_titan.rollout.byte_sizes import GIB, readable_size

    gpu = arguments.device == "gpu"
    ranks = arguments.ranks or ranks_of(config)
    plan_batch(config, ranks)
    available = None
    if arguments.device_memory is not None:
        available = int(arguments.device_memory * GIB)
    elif gpu and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    reserve = int(arguments.reserve * GIB) if arguments.reserve is not None else GPU_RESERVE if gpu else 0
    choice = CheckpointingChoice(config)
    if config.activation_checkpoint.mode == "auto":
        if available is None:
            raise UserError("activation_checkpoint.mode is 'auto', which goes by the device's memory; give --device-memory")
        limit = usable_memory(available, gpu) if arguments.reserve is None else available - reserve
        choice = choose_within(config, ranks, gpu, limit, f"the device has {readable_size(available)}")
    config = choice.config
    estimate = estimate_memory(config, ranks, gpu)
    fits = None if available is None else estimate.peak + reserve <= available
    if arguments.json:
        result = asdict(estimate) | {"stages": estimate.stages, "peak": estimate.peak, "ranks": ranks}
        print(json.dumps(result | {"available": available, "reserve": reserve, "fits": fits}, indent=1))
    else:
        tokens = config.training.local_batch_size * config.training.seq_len // config.parallelism.context_parallel_degree
        print(
            f"{config.model.name} {config.model.flavor}, {tokens} tokens per rank and microbatch, {ranks} rank(s), "
            f"{arguments.device}: computed, not measured\n\n{table(estimate)}"
        )
        if choice.words:
            print(f"\nactivation checkpointing: {choice.words}")
    if fits is not False:
        return 0
    shortage = (
        f"the run does not fit: a rank needs {readable_size(estimate.peak)} and {readable_size(reserve)} in reserve, "
        f"the device has {readable_size(available)}"
    )
    change = change_that_fits(config, ranks, gpu, available - reserve)
    print(f"{shortage}; {change or 'no single setting makes it fit: shard a smaller model over more ranks'}", file=sys.stderr)
    return FAILED
