"""How many microbatches share a round of rollouts: as many as the memory of a GPU allows."""

import bisect
from dataclasses import replace

import torch

from refine_titan.config.batch_plan import RoundSizes, plan_batch
from refine_titan.config.phases import has_rollouts
from refine_titan.config.sections import JobConfig
from refine_titan.estimation.checkpointing_choice import usable_memory
from refine_titan.estimation.memory import estimate_memory
from refine_titan.models.sizes import resolve_args
from refine_titan.rollout.engine_memory import device_memory, memory_needs
from refine_titan.worker_process import WorkerProcess


def plan_rounds(config: JobConfig, num_ranks: int) -> RoundSizes:
    """Returns the sizes of a run's rounds: as configured; else what fits a GPU by the estimate, or needs little memory on a CPU. The
    estimate does not cover the answers of post-training: unless configured, they are sampled microbatch by microbatch."""
    microbatches = plan_batch(config, num_ranks).microbatches
    sizes = RoundSizes.without_estimate(config, microbatches)
    is_counted = has_rollouts(config) and not config.training.enable_cpu_offload
    if config.rollout.microbatches_per_round or microbatches == 1 or not torch.cuda.is_available() or not is_counted:
        return sizes
    limit = usable_memory(device_memory(num_ranks).size, gpu=True)
    worker = WorkerProcess()  # as for the choice of activation checkpointing
    try:
        worker.send(largest_round, config, num_ranks, True, limit)
        size = worker.receive(largest_round)
    finally:
        worker.end()
    in_training_pass = config.refine.scores_in_training_pass(config.refine.num_mini_batches)
    return RoundSizes(scored=1, trained=size) if in_training_pass else RoundSizes(scored=size, trained=1)


def largest_round(config: JobConfig, num_ranks: int, gpu: bool, limit: int) -> int:
    """The most microbatches that can be read before a round of rollouts within `limit` bytes; at least one."""
    args, estimate = resolve_args(config.model), estimate_memory(config, num_ranks, gpu)

    def peak(size: int) -> int:
        sized = replace(config, rollout=replace(config.rollout, microbatches_per_round=size))
        return replace(estimate, needs=memory_needs(sized, args, num_ranks, gpu), microbatches_per_round=size).peak

    larger = range(2, plan_batch(config, num_ranks).microbatches + 1)
    return 1 + bisect.bisect_right(larger, limit, key=peak)
