"""Chooses activation checkpointing from the memory estimate, where `activation_checkpoint.mode` is `auto`.

Everything that is computed a second time costs time, and nothing else: the cheapest mode is the first of none, selective and full with
which a rank's peak fits its device.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.estimation.memory import GPU_RESERVE, estimate_memory
from refine_titan.models.sizes import resolve_args
from refine_titan.rollout.byte_sizes import readable_size
from refine_titan.rollout.engine_memory import device_memory, memory_needs
from refine_titan.worker_process import WorkerProcess

# From the least that is computed again to the most.
MODES = ("none", "selective", "full")
# Share of a device's memory that the estimate may fill. No estimate has been compared with a GPU yet; on a CPU other programs share it.
GPU_SHARE, CPU_SHARE = 0.9, 0.8


@dataclass(frozen=True)
class CheckpointingChoice:
    """A mode of activation checkpointing, and why it was chosen.

    Attributes:
        config: the run's settings with this mode.
        words: mode and reason for people; empty if the settings name the mode themselves.
    """

    config: JobConfig
    words: str = ""


def choose_checkpointing(config: JobConfig, num_ranks: int) -> CheckpointingChoice:
    """Replaces the mode `auto` by the cheapest one with which a rank fits this machine's devices.

    A process of its own estimates the memory, which takes seconds: meshes of virtual ranks would stay in DTensor's caches, where the
    run's own meshes would be taken for them.

    Raises:
        UserError: if weights are offloaded, which the estimate does not cover.
    """
    if config.activation_checkpoint.mode != "auto":
        return CheckpointingChoice(config)
    uncounted = _not_estimated(config)
    if uncounted is not None:
        return uncounted
    gpu, memory = torch.cuda.is_available(), device_memory(num_ranks)
    worker = WorkerProcess()
    try:
        worker.send(choose_within, config, num_ranks, gpu, usable_memory(memory.size, gpu), memory.words)
        return worker.receive(choose_within)
    finally:
        worker.end()


def usable_memory(size: int, gpu: bool) -> int:
    """The bytes of a device that the estimate may fill."""
    return int(GPU_SHARE * size) - GPU_RESERVE if gpu else int(CPU_SHARE * size)


def choose_within(config: JobConfig, num_ranks: int, gpu: bool, limit: int, origin: str) -> CheckpointingChoice:
    """Chooses the cheapest mode with which a rank needs at most `limit` bytes; full, if none does.

    Args:
        origin: a sentence that says where the limit comes from.
    """
    uncounted = _not_estimated(config)
    if uncounted is not None:
        return uncounted
    bound = f"it may take {readable_size(limit)}, as {origin}"
    needs = memory_needs(config, resolve_args(config.model), num_ranks, gpu)
    if needs.total > limit:
        return _choice(config, "full", f"a rank needs at least {readable_size(needs.total)}, more than fits ({bound})")
    peaks = []
    for mode in MODES:
        with _quiet():
            peak = estimate_memory(_with_mode(config, mode), num_ranks, gpu).peak
        peaks.append(f"{mode} {readable_size(peak)}")
        if peak <= limit:
            break
    fits = "the first that fits" if peak <= limit else "the least, although it does not fit by the estimate"
    return _choice(config, mode, f"{fits}: a rank's peak is {', '.join(peaks)}; {bound}")


def _not_estimated(config: JobConfig) -> CheckpointingChoice | None:
    """The choice for a run that the estimate does not cover; raises UserError if there is none."""
    if config.training.enable_cpu_offload:
        raise UserError(
            "activation_checkpoint.mode is 'auto' and training.enable_cpu_offload is set: memory with offloaded weights is not "
            "estimated; allowed with it: 'none', 'selective', 'full'"
        )
    if config.refine.phase != "midtrain":
        uncounted = "answers" if config.refine.phase == "posttrain" else "prompts longer than training.seq_len"
        return _choice(config, "full", f"the memory estimate does not cover {uncounted}, which the phase {config.refine.phase!r} may have")
    return None


def require_same_mode(config: JobConfig, device: torch.device) -> None:
    """Checks that all ranks have chosen the same mode, by their devices. Every rank must call this.

    Raises:
        UserError: if they have not.
    """
    number = MODES.index(config.activation_checkpoint.mode)
    range_of_numbers = torch.tensor([number, -number], device=device)
    dist.all_reduce(range_of_numbers, op=dist.ReduceOp.MAX)
    most, least = int(range_of_numbers[0]), -int(range_of_numbers[1])
    if most != least:
        raise UserError(
            f"activation_checkpoint.mode = 'auto' chooses {MODES[least]!r} on some ranks and {MODES[most]!r} on others, as their devices "
            f"differ in memory; allowed here: {', '.join(map(repr, MODES))}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what building a model says: the run will say it again."""
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.disabled = was_disabled


def _with_mode(config: JobConfig, mode: str) -> JobConfig:
    return replace(config, activation_checkpoint=replace(config.activation_checkpoint, mode=mode))


def _choice(config: JobConfig, mode: str, reason: str) -> CheckpointingChoice:
    return CheckpointingChoice(_with_mode(config, mode), f"{mode} ({reason})")
