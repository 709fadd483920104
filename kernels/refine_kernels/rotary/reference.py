"""Rotary position encoding in plain torch. Legend: T rows, H heads, D channels of a head, R = D / 2."""

import torch

from refine_kernels.footprint import wants_gpu_footprint


class Rotation:
    """Cosines and sines of the angles of given positions, for heads of D channels, `[T, R]` in at least float32."""

    def __init__(self, positions_T: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
        # float32 as in flash-linear-attention's rotary embedding: at position 10^5 the rounding of an angle shows
        angles = positions_T.to(torch.float32)[:, None] * (1.0 / theta**exponents)
        self.cos_TR, self.sin_TR = angles.cos().to(dtype), angles.sin().to(dtype)

    def apply(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Rotates channel i with channel i + R; differentiable by `x_THD`."""
        return _turn(x_THD).apply(x_THD, self.cos_TR, self.sin_TR)


def _turn(x: torch.Tensor) -> type[torch.autograd.Function]:
    if wants_gpu_footprint():
        return _Footprint
    if not x.is_cuda:
        return _Turn
    from refine_kernels.rotary.rotary_kernels import Turn  # triton is not on every machine without a GPU

    return Turn


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THD, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        return _turned(x_THD, cos_TR, sin_TR)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        cos_TR, sin_TR = ctx.saved_tensors
        return _turned(grad_THD, cos_TR, -sin_TR), None, None


class _Footprint(torch.autograd.Function):
    """Reads and writes what the GPU's kernel does, without its arithmetic: values mean nothing."""

    @staticmethod
    def forward(ctx, x_THD, cos_TR, sin_TR):
        return x_THD.neg()

    @staticmethod
    def backward(ctx, grad_THD):
        return grad_THD.neg(), None, None


def _turned(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b = x_THD.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_THD.dtype)
