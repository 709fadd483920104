"""`silu(gate) * up`, as MLPs and LaCT's fast networks compute it.

A GPU runs flash-linear-attention's kernel, which keeps only its two inputs for backward.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from refine_kernels.footprint import wants_gpu_footprint


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns `silu(gate) * up` for two tensors of the same shape.

    The plain form runs where torch.compile fuses it anyway, and for float64, because the kernel computes in float32.
    """
    is_plain = torch.compiler.is_compiling() or isinstance(gate, DTensor) or gate.dtype == torch.float64
    if not is_plain and wants_gpu_footprint():
        return _Footprint.apply(gate, up)
    if is_plain or not gate.is_cuda:
        return F.silu(gate) * up
    from fla.modules.activations import swiglu  # not on every machine without a GPU

    return swiglu(gate, up)


class _Footprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernel, without its arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return gate + up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return gate + grad, up.neg()
