"""What trainer and engine need of a rank's memory, counted before anything is built."""

import os
from dataclasses import dataclass

import torch

from refine_titan.config.phases import has_rollouts, needs_engine, samples_answers
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.device import total_memory_bytes
from refine_titan.distributed.shards import parameter_bytes
from refine_titan.errors import UserError
from refine_titan.models import build_decoder
from refine_titan.models.decoder import DecoderArgs
from refine_titan.rollout.native import MAX_LAYER_STEPS
from refine_titan.rollout.vllm_settings import cache_bytes, engine_dtype, readable_size


@dataclass(frozen=True)
class MemoryNeeds:
    """The least bytes that a rank needs, of trainer and engine together.

    Attributes:
        weights: this rank's shards in the training dtype, exactly.
        gradients: as many.
        optimizer: both moments of Adam.
        block_inputs: what the backward of one microbatch starts from.
        engine_weights: copies that cannot share the trainer's storage, or cast ones that a recorded round keeps.
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
        """What a rank holds through all of training."""
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
    """Counted, not measured: whatever is not certain is left out. `tools/estimate_memory.py` adds the rest.

    Args:
        gpu: whether the run is on GPUs.
    """
    with torch.device("meta"):
        model = build_decoder(args)
    num_params = sum(p.numel() for p in model.parameters())
    training, parallelism = config.training, config.parallelism
    master, compute, engine = getattr(torch, training.dtype), getattr(torch, training.mixed_precision_param), engine_dtype(config)
    # `plan_batch` judges the degrees; here they only count.
    tensor = parallelism.tensor_parallel_degree
    weights = parameter_bytes(config, args, num_ranks).weights
    # Between blocks the rows of a sequence are spread over the ranks that share it.
    rows = training.local_batch_size * training.seq_len // (tensor * parallelism.context_parallel_degree)
    engine_weights = engine_cache = 0
    if needs_engine(config) and config.rollout.engine == "vllm":
        is_shared = num_ranks == tensor and engine == master
        engine_weights = 0 if is_shared else num_params * engine.itemsize // tensor
        engine_cache = cache_bytes(config, args)
    elif config.rollout.cuda_graph and gpu and num_ranks == 1 and not args.has_attention:
        sequences = sum(n for n, k in _rounds(config) if args.n_layers * k <= MAX_LAYER_STEPS)
        engine_weights = 0 if compute == master or not sequences else num_params * compute.itemsize
        engine_cache = sequences * sum(block.mixer.bytes_read_by_a_row(compute, 0) for block in model.layers.values())
    return MemoryNeeds(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        block_inputs=rows * args.dim * args.n_layers * compute.itemsize,
        engine_weights=engine_weights,
        engine_cache=engine_cache,
    )


def _rounds(config: JobConfig) -> list[tuple[int, int]]:
    """Sequences and tokens of the rounds that a microbatch decodes."""
    sequences, refine, posttrain = config.training.local_batch_size, config.refine, config.posttrain
    rounds = []
    if has_rollouts(config):
        rounds.append((sequences * refine.num_chunks * refine.rollouts_per_position, refine.rollout_length))
    if samples_answers(config):
        rounds.append((sequences * posttrain.samples, posttrain.answer_tokens))
    return rounds


def check_engine_memory(config: JobConfig, args: DecoderArgs, num_ranks: int) -> None:
    """Checks that trainer and engine can fit this machine's devices.

    Raises:
        UserError: with the numbers.
    """
    needs = memory_needs(config, args, num_ranks, torch.cuda.is_available())
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
