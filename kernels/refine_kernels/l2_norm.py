"""L2 normalisation: vectors divided by their length. A GPU runs flash-linear-attention's kernel."""

import torch

from refine_kernels.footprint import wants_gpu_footprint

# Added to the squared length under the root, as in flash-linear-attention.
EPS = 1e-6


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """Divides every vector along the last dim by its length; computed in at least float32 and rounded once, to x's dtype."""
    if wants_gpu_footprint():
        return _Footprint.apply(x)
    if x.is_cuda and x.dtype != torch.float64:  # the kernel computes in float32
        from fla.modules.norm.l2norm import l2norm  # not on every machine without a GPU

        return l2norm(x, eps=EPS)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


class _Footprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernels, without their arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, x):
        y = x.neg()
        ctx.save_for_backward(y, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad):
        y, _ = ctx.saved_tensors
        return y + grad
