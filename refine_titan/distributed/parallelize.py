"""Parallelism of every family, in the order: activation checkpointing, then FSDP2 / HSDP.

Legend of axes: `dp_replicate` (copies), `fsdp` (shards).
"""

import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import apply_fsdp
from torchtitan.tools.utils import device_type


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Applies the job's parallelism to a decoder on the meta device. `plan_batch` has refused what is not supported."""
    # Activation checkpointing
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(model, job_config.activation_checkpoint, base_folder=job_config.job.dump_folder)

    # FSDP2 / HSDP
    if parallel_dims.fsdp_enabled:
        axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(axes),
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        )
        if device_type == "cpu":
            # gloo has no PREMUL_SUM, which FSDP2 uses for a gradient divide factor (torch 2.13.0).
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
    return model
