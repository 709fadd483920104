"""What trainer and engine need of a rank's memory, counted before anything is built."""

import os
from dataclasses import dataclass

import torch

from refine_titan.distributed.device import total_memory_bytes
from refine_titan.errors import UserError
from refine_titan.job_config import JobConfig
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.rollout.vllm_settings import cache_bytes, engine_dtype, readable_size


@dataclass(frozen=True)
class MemoryNeeds:
    """The least bytes that a rank needs, of trainer and engine together.

    Attributes:
        trainer: weights, gradients and both moments of Adam in the training dtype, and the block inputs that the backward of
            one microbatch starts from.
        engine_weights: copies that cannot share the trainer's storage.
        engine_cache: pages of state.
    """

    trainer: int
    engine_weights: int
    engine_cache: int

    @property
    def total(self) -> int:
        return self.trainer + self.engine_weights + self.engine_cache

    def __str__(self) -> str:
        return (
            f"at least {readable_size(self.total)}: {readable_size(self.trainer)} for weights, gradients, optimizer and block "
            f"inputs, {readable_size(self.engine_weights)} for the engine's weights, {readable_size(self.engine_cache)} for its "
            "states"
        )


def memory_needs(config: JobConfig, args: DecoderArgs, num_ranks: int) -> MemoryNeeds:
    """Counted, not measured: whatever is not certain is left out."""
    with torch.device("meta"):
        num_params = sum(p.numel() for p in FastWeightDecoder(args).parameters())
    training = config.training
    master, compute, engine = getattr(torch, training.dtype), getattr(torch, training.mixed_precision_param), engine_dtype(config)
    # `plan_batch` judges the degrees; here they only count.
    tensor = config.parallelism.tensor_parallel_degree
    shards = max(num_ranks // max(config.parallelism.data_parallel_replicate_degree, 1), 1)
    block_inputs = training.local_batch_size * training.seq_len * args.dim * args.n_layers * compute.itemsize
    is_shared = num_ranks == tensor and engine == master
    return MemoryNeeds(
        trainer=4 * num_params * master.itemsize // shards + block_inputs,
        engine_weights=0 if is_shared else num_params * engine.itemsize // tensor,
        engine_cache=cache_bytes(config, args),
    )


def check_engine_memory(config: JobConfig, args: DecoderArgs, num_ranks: int) -> None:
    """Checks that trainer and engine can fit this machine's devices.

    Raises:
        UserError: with the numbers.
    """
    needs = memory_needs(config, args, num_ranks)
    if torch.cuda.is_available():
        available, device = torch.cuda.get_device_properties(0).total_memory, "the GPU has"
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        available, device = total_memory_bytes() // ranks_here, "this machine has, for each of its ranks,"
    if needs.total > available:
        raise UserError(
            f"rollout.engine = 'vllm' does not fit beside the trainer: {device} {readable_size(available)}; a rank needs {needs} "
            "(rollout.cache_gib, or rollout.max_num_seqs where that is 0). Lower them, or spread the model over more ranks"
        )
