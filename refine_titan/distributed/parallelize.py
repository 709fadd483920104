"""Applies parallelism to a model of any family, in this order: tensor parallelism, compile, activation checkpointing, FSDP2 / HSDP.

Legend of mesh axes: `tp` (heads and channels), `dp_replicate` (copies), `fsdp` (shards).
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.attention.varlen  # registers its operators
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import apply_fsdp, disable_fsdp_gradient_division
from torchtitan.tools.utils import device_type

from refine_titan.distributed.compile import apply_compile
from refine_titan.distributed.tensor_parallel import apply_tensor_parallel

# Operators whose results `selective_ac_option = "op"` keeps instead of computing them twice; of the matrix products torchtitan keeps
# every second one. The sequence operators are not single operators of torch: they are computed again, from the projections kept.
SAVED_OPERATORS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.aten.max.default,  # float8's scales
}


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Applies the job's parallelism to a decoder on the meta device. `plan_batch` has already refused unsupported settings."""
    # Tensor parallelism
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))

    # Compile
    if job_config.compile.enable:
        apply_compile(model, job_config.compile)

    # Activation checkpointing
    if job_config.activation_checkpoint.mode == "auto":
        raise RuntimeError("activation_checkpoint.mode is still 'auto': estimation/checkpointing_choice.py has to choose one first")
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            # Blocks draw no random numbers. Preserving the generators' state would read it in every forward, also without gradient and
            # while a CUDA graph is captured.
            replace(job_config.activation_checkpoint, preserve_rng_state=False),
            model_compile_enabled=job_config.compile.enable,
            op_sac_save_list=SAVED_OPERATORS,
            base_folder=job_config.job.dump_folder,
        )

    # FSDP2 / HSDP
    if parallel_dims.fsdp_enabled:
        axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        mesh = parallel_dims.get_mesh(axes)
        reduce_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce]
        param_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        _shard_float32_modules(model, mesh, reduce_dtype, job_config)
        shard = _apply_fsdp_to_tied if model.model_args.tie_word_embeddings else apply_fsdp
        shard(
            model,
            mesh,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
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


def _apply_fsdp_to_tied(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    pp_enabled: bool,
    cpu_offload: bool,
    reshard_after_forward_policy: str,
) -> None:
    """Replaces torchtitan's `apply_fsdp` (0.2.2) for a model whose head is its embeddings.

    `apply_fsdp` would put the two into groups of their own, but a parameter belongs to one group only (torch 2.13.0). Here they belong to
    the root's group, which stays gathered from the beginning of a forward to the end of its backward.
    """
    assert not pp_enabled
    settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)}
    if cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy()
    for block in model.layers.values():
        fully_shard(block, **settings, reshard_after_forward=reshard_after_forward_policy != "never")
    fully_shard(model, **settings)
    disable_fsdp_gradient_division(model)


def _shard_float32_modules(model: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype, job_config: JobConfig) -> None:
    """Makes every module that stays float32 an FSDP group of its own, so that the group of its block does not cast its parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=reduce_dtype)
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    offload = {"offload_policy": CPUOffloadPolicy()} if job_config.training.enable_cpu_offload else {}
    for module in model.modules():
        if getattr(module, "keeps_float32", False):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **offload)
