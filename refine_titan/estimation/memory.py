"""Estimates the memory of a rank: what it holds, what each stage of a step adds, and which change of a setting makes it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from refine_titan.config.batch_plan import least_microbatches_per_round, plan_batch
from refine_titan.config.bounds import check_bounds
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.shards import parameter_bytes
from refine_titan.errors import UserError
from refine_titan.estimation.rehearsal import KEPT_UNTIL_ROLLOUTS, StepBytes, rehearse
from refine_titan.models.sizes import resolve_args
from refine_titan.rollout.build import engine_changes_that_save_memory, engine_gives_memory_back
from refine_titan.rollout.byte_sizes import GIB, readable_size
from refine_titan.rollout.engine_memory import MemoryNeeds, memory_needs
from refine_titan.validation import validate

# An allowance for what is not counted: CUDA's context, NCCL's buffers and gaps between the allocator's blocks.
GPU_RESERVE = 4 * GIB


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimate for one rank, in bytes.

    Attributes:
        needs: weights, gradients, optimizer and engine, counted as in the run's own check.
        step: what the stages of a step add.
        prefetched: weights that FSDP2 gathers for the next block while a block runs.
        engine_sleeps: whether the engine frees its memory before the update.
        microbatches_per_round: microbatches that are read before one round of rollouts.
        waits_in_update: whether those that have been read wait during updates, too: their reading is the training forward.
    """

    needs: MemoryNeeds
    step: StepBytes
    prefetched: int
    engine_sleeps: bool
    microbatches_per_round: int = 1
    waits_in_update: bool = False

    @property
    def stages(self) -> dict[str, int]:
        """Bytes at the peak of each stage."""
        engine = self.needs.engine_weights + self.needs.engine_cache
        waiting = (self.microbatches_per_round - 1) * self.step.parts.get(KEPT_UNTIL_ROLLOUTS, 0)

        def others(stage: str) -> int:
            if stage == "update":
                return (0 if self.engine_sleeps else engine) + (waiting if self.waits_in_update else 0)
            return engine + waiting

        return {name: self.needs.held + added + self.prefetched + others(name) for name, added in self.step.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def estimate_memory(config: JobConfig, num_ranks: int, gpu: bool) -> MemoryEstimate:
    """Counts a rank's memory without allocating it.

    Args:
        gpu: whether the run is on GPUs; operators on a CPU save more for backward.

    Raises:
        UserError: the settings do not fit `num_ranks` ranks, or weights are offloaded.
    """
    if config.training.enable_cpu_offload:
        raise UserError("training.enable_cpu_offload is set: memory with offloaded weights is not estimated; allowed: false")
    args = resolve_args(config.model)
    needs = memory_needs(config, args, num_ranks, gpu)
    prefetched = parameter_bytes(config, args, num_ranks).gathered if gpu else 0
    return MemoryEstimate(
        needs,
        rehearse(config, num_ranks, gpu),
        prefetched,
        engine_gives_memory_back(config, gpu),
        least_microbatches_per_round(config, num_ranks),
        config.refine.scores_in_training_pass(config.refine.num_mini_batches),
    )


def change_that_fits(config: JobConfig, num_ranks: int, gpu: bool, limit: int) -> str | None:
    """The first change of a setting with which a rank needs at most `limit` bytes, described in words; None if there is none.

    Changes that cost the run least are tried first.
    """
    for settings, ranks in _changes(config, num_ranks, gpu):
        changed = config
        for name, value in settings.items():
            changed = _with(changed, name, value)
        try:
            check_bounds(changed)
            validate(changed)
            plan_batch(changed, ranks)
        except UserError:
            continue
        needs = memory_needs(changed, resolve_args(changed.model), ranks, gpu)
        if needs.trainer > limit:
            continue
        peak = estimate_memory(changed, ranks, gpu).peak
        if peak <= limit:
            words = " and ".join(f"{name} = {value!r}" for name, value in settings.items())
            on = f" on {ranks} ranks" if ranks != num_ranks else ""
            return f"{words}{on} needs {readable_size(peak)}"
    return None


def _changes(config: JobConfig, num_ranks: int, gpu: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields settings that save memory, with the number of ranks that they need; those that cost least come first."""
    parallelism, training, refine = config.parallelism, config.training, config.refine
    if config.activation_checkpoint.mode != "full":
        yield {"activation_checkpoint.mode": "full"}, num_ranks
    for settings in engine_changes_that_save_memory(config, num_ranks, gpu):
        yield settings, num_ranks
    for factor in (2, 4, 8):
        if training.local_batch_size % factor == 0:
            yield {"training.local_batch_size": training.local_batch_size // factor}, num_ranks
    has_stride = resolve_args(config.model).snapshot_stride(refine.snapshot_stride) == refine.snapshot_stride
    for factor in (2, 4, 8, 16):
        if has_stride and refine.snapshot_stride * factor <= training.seq_len // refine.num_chunks:
            yield {"refine.snapshot_stride": refine.snapshot_stride * factor}, num_ranks
    shards = parallelism.data_parallel_shard_degree
    if shards == -1:
        shards = num_ranks // (parallelism.data_parallel_replicate_degree * parallelism.tensor_parallel_degree)
        shards //= parallelism.context_parallel_degree
    for factor in (2, 4, 8, 16):
        yield {"parallelism.data_parallel_shard_degree": shards * factor}, num_ranks * factor
    for factor in (2, 4, 8, 16):
        yield {"training.seq_len": training.seq_len // factor}, num_ranks


def _with(config: JobConfig, name: str, value: Any) -> JobConfig:
    section, key = name.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{key: value})})


def table(estimate: MemoryEstimate) -> str:
    """The estimate as a table for people, in GiB."""
    needs = estimate.needs
    rows = [
        ("weights", needs.weights),
        ("gradients", needs.gradients),
        ("optimizer", needs.optimizer),
        ("engine weights", needs.engine_weights),
        ("engine states", needs.engine_cache),
        ("FSDP2's prefetch", estimate.prefetched),
        (None, 0),
        *((f"{stage}: adds", added) for stage, added in estimate.step.stages.items()),
        *((f"  of which {part}", size) for part, size in estimate.step.parts.items()),
        (None, 0),
        *((f"peak of {stage}", total) for stage, total in estimate.stages.items()),
        ("peak", estimate.peak),
    ]
    return "\n".join(f"{name:<36}{size / GIB:>9.2f} GiB" if name else "" for name, size in rows)
