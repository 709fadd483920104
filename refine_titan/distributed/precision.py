"""Sets the precision in which forwards compute, in every layout."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from refine_titan.config.sections import JobConfig


def compute_precision(config: JobConfig, parallel_dims: ParallelDims) -> AbstractContextManager:
    """The context in which forwards compute in `training.mixed_precision_param`.

    FSDP2 casts by itself. All other layouts run under autocast. This includes tensor parallelism alone, for which torchtitan's own
    context (0.2.2) would leave the whole step in `training.dtype`.
    """
    name = config.training.mixed_precision_param
    if parallel_dims.fsdp_enabled or name == "float32":  # torch ignores autocast to float32, with a warning
        return nullcontext()
    return torch.autocast(device_type, dtype=TORCH_DTYPE_MAP[name])
