"""Counts the memory that trainer and engine need on a rank, before anything is built."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from refine_titan.config.phases import needs_engine
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.device import total_memory_bytes
from refine_titan.distributed.shards import parameter_bytes
from refine_titan.errors import UserError
from refine_titan.models import build_decoder
from refine_titan.models.decoder import DecoderArgs
from refine_titan.rollout.build import engine_memory
from refine_titan.rollout.byte_sizes import readable_size
from refine_titan.rollout.engine_host import EngineMemory


@dataclass(frozen=True)
class MemoryNeeds:
    """The least bytes that a rank needs, for trainer and engine together.

    Attributes:
        weights: this rank's shards in the training dtype.
        gradients: the gradients of these shards.
        optimizer: both moments of Adam.
        block_inputs: inputs of all blocks in one microbatch, which its backward needs.
        engine_weights: copies that cannot share the trainer's storage, or cast weights that a recorded round keeps.
        engine_cache: pages of state, or the states of a recorded round.
    """

    weights: int
    gradients: int
    optimizer: int
    block_inputs: int
    engine_weights: int
    engine_cache: int

    @property
    def held(self) -> int:
        """Bytes that a rank holds throughout training."""
        return self.weights + self.gradients + self.optimizer

    @property
    def trainer(self) -> int:
        return self.held + self.block_inputs

    @property
    def total(self) -> int:
        return self.trainer + self.engine_weights + self.engine_cache

    def __str__(self) -> str:
        return (
            f"at least {readable_size(self.total)}: {readable_size(self.trainer)} for weights, gradients, optimizer and block "
            f"inputs, {readable_size(self.engine_weights)} for the engine's weights, {readable_size(self.engine_cache)} for its "
            "states"
        )


def memory_needs(config: JobConfig, args: DecoderArgs, num_ranks: int, gpu: bool) -> MemoryNeeds:
    """Counts what is certain; `refine-titan estimate` adds the rest.

    Args:
        gpu: whether the run is on GPUs.
    """
    with torch.device("meta"):
        model = build_decoder(args)
    training, parallelism = config.training, config.parallelism
    compute = getattr(torch, training.mixed_precision_param)
    # `plan_batch` judges the degrees; here they only count.
    tensor = parallelism.tensor_parallel_degree
    weights = parameter_bytes(config, args, num_ranks).weights
    # Between blocks the hidden states of a sequence are spread over the ranks that share it.
    rows = training.local_batch_size * training.seq_len // (tensor * parallelism.context_parallel_degree)
    engine = engine_memory(config, model, num_ranks, gpu) if needs_engine(config) else EngineMemory(0, 0)
    return MemoryNeeds(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        block_inputs=rows * args.dim * args.n_layers * compute.itemsize,
        engine_weights=engine.weights,
        engine_cache=engine.states,
    )


class DeviceMemory(NamedTuple):
    """Bytes of memory that a rank has, and a sentence that says so."""

    size: int
    words: str


def device_memory(num_ranks: int) -> DeviceMemory:
    """The memory of a rank on this machine: the GPU's, or its part of the machine's.

    Args:
        num_ranks: ranks on this machine, unless torchrun says how many.
    """
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return DeviceMemory(size, f"the GPU has {readable_size(size)}")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    size = total_memory_bytes() // ranks_here
    return DeviceMemory(size, f"this machine has {readable_size(size)} for {'each of its ranks' if ranks_here > 1 else 'its rank'}")


def check_memory(config: JobConfig, args: DecoderArgs, num_ranks: int) -> None:
    """Checks that trainer and engine can fit this machine's devices.

    Raises:
        UserError: with the numbers.
    """
    needs = memory_needs(config, args, num_ranks, torch.cuda.is_available())
    memory = device_memory(num_ranks)
    if needs.total > memory.size:
        raise UserError(
            f"the run does not fit: {memory.words}; a rank needs {needs} with rollout.engine = "
            f"{config.rollout.engine!r}. Spread the model over more ranks; the engine's states also follow rollout.cache_gib and "
            "rollout.max_num_seqs (vLLM)"
        )
