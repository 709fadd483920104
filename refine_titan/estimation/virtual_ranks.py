"""Builds a run's model on meshes of any size in one process, with torch's fake backend, whose collectives move no data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import set_default_dtype

from refine_titan.config.batch_plan import plan_batch
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.parallelize import parallelize
from refine_titan.models import build_decoder
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder


def ranks_of(config: JobConfig) -> int:
    """The number of ranks of a run: from torchrun (WORLD_SIZE), from NGPU, or the product of its parallel degrees."""
    named = os.environ.get("WORLD_SIZE", os.environ.get("NGPU"))
    parallelism = config.parallelism
    if named is None and parallelism.data_parallel_shard_degree > 0:
        degrees = (parallelism.data_parallel_shard_degree, parallelism.data_parallel_replicate_degree)
        return degrees[0] * degrees[1] * parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
    return int(named or 1)


@contextmanager
def virtual_ranks(config: JobConfig, num_ranks: int, rank: int = 0) -> Iterator[ParallelDims]:
    """Makes this process rank `rank` of `num_ranks` inside the context, and yields the run's meshes.

    Raises:
        UserError: the run's batch and parallel degrees do not fit `num_ranks` ranks.
    """
    plan_batch(config, num_ranks)
    if dist.is_initialized():
        raise RuntimeError("this process has a process group already: virtual ranks need one of their own")
    dist.init_process_group("fake", rank=rank, world_size=num_ranks)
    try:
        parallelism = config.parallelism
        parallel_dims = ParallelDims(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=1,
            ep=1,
            etp=1,
            world_size=num_ranks,
        )
        parallel_dims.build_mesh()
        yield parallel_dims
    finally:
        dist.destroy_process_group()


def build_model(config: JobConfig, args: DecoderArgs, parallel_dims: ParallelDims, device: str = "meta") -> FastWeightDecoder:
    """Builds a model with the run's parallelism; on the meta device, it is what torchtitan's Trainer builds before it allocates."""
    with torch.device(device), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = build_decoder(args)
    return parallelize(model, parallel_dims, config)
