"""Rotary position encoding in plain torch. Legend: T tokens, H heads, D channels of a head, R = D / 2."""

import torch

from refine_kernels.footprint import wants_gpu_footprint


class Rotation:
    """Cosines and sines of the rotation angles at given positions, `[T, R]` in at least float32, for heads of D channels."""

    def __init__(self, positions_T: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
        # float32 as in flash-linear-attention's rotary embedding: at position 10^5 the rounding of an angle is visible in the result.
        angles = positions_T.to(torch.float32)[:, None] * (1.0 / theta**exponents)
        self.cos_TR, self.sin_TR = angles.cos().to(dtype), angles.sin().to(dtype)

    def apply(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Rotates every pair of channels i and i + R; differentiable with respect to `x_THD`."""
        return _implementation(x_THD).apply(x_THD, self.cos_TR, self.sin_TR)


def _implementation(x: torch.Tensor) -> type[torch.autograd.Function]:
    if wants_gpu_footprint():
        return _Footprint
    if not x.is_cuda:
        return _PlainRotation
    from refine_kernels.rotary.rotary_kernels import TritonRotation  # triton is not on every machine without a GPU

    return TritonRotation


class _PlainRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THD, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        return _rotate(x_THD, cos_TR, sin_TR)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(grad_THD, cos_TR, -sin_TR), None, None


class _Footprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernel, without its arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, x_THD, cos_TR, sin_TR):
        return x_THD.neg()

    @staticmethod
    def backward(ctx, grad_THD):
        return grad_THD.neg(), None, None


def _rotate(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b = x_THD.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_THD.dtype)
