"""Computes how much of a model one rank holds, without building meshes. The result is for rank 0, which holds the most."""

import math
from dataclasses import dataclass

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from refine_titan.config.sections import JobConfig
from refine_titan.distributed.tensor_parallel import split_dims
from refine_titan.models import build_decoder
from refine_titan.models.decoder import DecoderArgs


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of parameters on one rank.

    Attributes:
        weights: the rank's shards in the training dtype; FSDP2 pads them to equal size.
        gathered: the largest FSDP2 group (a block, or the embeddings, or norm and head) in the compute dtype; 0 without FSDP2.
    """

    weights: int
    gathered: int


def parameter_bytes(config: JobConfig, args: DecoderArgs, num_ranks: int) -> ParameterBytes:
    """Counts the bytes on a model on the meta device. Does not check the degrees of parallelism; `plan_batch` does."""
    parallelism, training = config.parallelism, config.training
    tensor = parallelism.tensor_parallel_degree
    shards = max(num_ranks // (max(parallelism.data_parallel_replicate_degree, 1) * tensor), 1)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
        model = build_decoder(args)
    dims = split_dims(model) if tensor > 1 else {}
    compute = TORCH_DTYPE_MAP[training.mixed_precision_param]
    weights, groups = 0, {}
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        if dims.get(name) is not None:
            shape[dims[name]] //= tensor
        weights += -(-shape[0] // shards) * math.prod(shape[1:]) * parameter.dtype.itemsize
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0].replace("norm", "output")
        groups[group] = groups.get(group, 0) + math.prod(shape) * compute.itemsize
    return ParameterBytes(weights, max(groups.values()) if shards > 1 else 0)
