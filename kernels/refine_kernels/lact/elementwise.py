"""The operations that LaCT applies per token around its matrix products, in plain torch. README.md has the maths.

Legend: T tokens, H heads, D channels of a head, M hidden channels of the fast network.
"""

import torch
import torch.nn.functional as F

from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.lact.constants import UNIT_EPS


def unit_vectors(x_THD: torch.Tensor, scale_HD: torch.Tensor, offset_HD: torch.Tensor, *, silu: bool) -> torch.Tensor:
    """Computes `x * scale + offset`, then SiLU if `silu`, then scales each head's vector to length 1, measured in at least float32."""
    is_compiling = torch.compiler.is_compiling()  # the compiler fuses the plain form itself
    if not is_compiling and wants_gpu_footprint():
        return _UnitVectorsFootprint.apply(x_THD, scale_HD, offset_HD)
    if not is_compiling and x_THD.is_cuda:
        from refine_kernels.lact.elementwise_kernels import UnitVectors  # triton is not on every machine without a GPU

        return UnitVectors.apply(x_THD, scale_HD, offset_HD, silu)
    x_THD = x_THD * scale_HD + offset_HD
    if silu:
        x_THD = F.silu(x_THD)
    wide = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    return (wide / (wide.norm(dim=-1, keepdim=True) + UNIT_EPS)).to(x_THD.dtype)


def writing_factors(
    gate: torch.Tensor, up: torch.Tensor, d_hidden: torch.Tensor, lr_3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors on the hidden channels' side of what tokens write to w0, w1 and w2, each times its learning rate.

    Args:
        gate, up: `w0 k` and `w2 k`, `[..., M]`.
        d_hidden: `w1^T v`, `[..., M]`.
        lr_3: learning rates, `[..., 3]`, at least float32.

    Returns:
        `d_hidden up silu'(gate) lr0`, `silu(gate) up lr1` and `d_hidden silu(gate) lr2`, in the dtype of `gate`.
    """
    if wants_gpu_footprint():
        return _WritingFactorsFootprint.apply(gate, up, d_hidden, lr_3)
    if gate.is_cuda:
        from refine_kernels.lact.elementwise_kernels import WritingFactors

        return WritingFactors.apply(gate, up, d_hidden, lr_3)
    sigma = gate.sigmoid()
    silu = gate * sigma
    slope = sigma * (1 + gate * (1 - sigma))
    lr0, lr1, lr2 = lr_3.unsqueeze(-1).unbind(-2)
    factors = (d_hidden * up * slope * lr0, silu * up * lr1, d_hidden * silu * lr2)
    return tuple(x.to(gate.dtype) for x in factors)


class _UnitVectorsFootprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernels, without their arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, x_THD, scale_HD, offset_HD):
        ctx.save_for_backward(x_THD, scale_HD, offset_HD)
        return x_THD.neg()

    @staticmethod
    def backward(ctx, grad):
        x_THD, scale_HD, offset_HD = ctx.saved_tensors
        return x_THD + grad, torch.empty_like(scale_HD), torch.empty_like(offset_HD)


class _WritingFactorsFootprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernels, without their arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, gate, up, d_hidden, lr_3):
        ctx.save_for_backward(gate, up, d_hidden, lr_3)
        return gate.neg(), up.neg(), d_hidden.neg()

    @staticmethod
    def backward(ctx, *grads):
        *saved, lr_3 = ctx.saved_tensors
        return *(x + grad for x, grad in zip(saved, grads)), torch.empty_like(lr_3)
