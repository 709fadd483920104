"""The operations that LaCT applies around its matrix products, in plain torch or as one kernel of a GPU. README.md has the maths.

Legend: T tokens, g sequences, H heads, D channels of a head, M hidden channels of the fast network.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F

from refine_kernels.footprint import report_traffic, wants_gpu_footprint
from refine_kernels.lact.constants import ROW_EPS, UNIT_EPS


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


def hidden(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) up`, for `gate` and `up` side by side in one tensor `[..., 2 M]`."""
    return _Hidden.apply(gate_up)


def writing_factors(gate_up: torch.Tensor, d_hidden: torch.Tensor, lr_3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors on the hidden channels' side of what tokens write to w0, w1 and w2, each times its learning rate.

    Args:
        gate_up: `w0 k` and `w2 k` side by side, `[..., 2 M]`.
        d_hidden: `w1^T v`, `[..., M]`.
        lr_3: learning rates, `[..., 3]`, at least float32.

    Returns:
        `d_hidden up silu'(gate) lr0` and `d_hidden silu(gate) lr2` side by side, and `silu(gate) up lr1`, in the dtype of `gate_up`.
    """
    return _WritingFactors.apply(gate_up, d_hidden, lr_3)


def rescaled(weights: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Scales each row of `weights`, `[g, ..., D]`, to its length in `lengths`, `[1, ..., 1]`."""
    return _Rescaled.apply(weights, None, lengths, "rescaled", weights.dtype)


def added_and_rescaled(
    weights: torch.Tensor,
    change: torch.Tensor,
    lengths: torch.Tensor,
    keep: Literal["sum", "rescaled"],
    read_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a change to weights and rescales the rows of the sum, as `rescaled` does.

    Returns:
        The sum, or the rescaled sum, in the dtype of `weights`; and the rescaled sum in `read_dtype`.
    """
    found = _Rescaled.apply(weights, change, lengths, keep, read_dtype)
    return found if isinstance(found, tuple) else (found, found)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        if wants_gpu_footprint():
            return _written_by_one_kernel((gate_up,), torch.empty_like(gate))
        if gate_up.is_cuda:
            return _kernels().hidden(gate_up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        if wants_gpu_footprint():
            return _written_by_one_kernel((gate_up, grad), torch.empty_like(gate_up))
        if grad.is_cuda:
            return _kernels().hidden_gradient(gate_up, grad)
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


class _WritingFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, d_hidden, lr_3):
        lr_3 = lr_3.contiguous()
        ctx.save_for_backward(gate_up, d_hidden, lr_3)
        if wants_gpu_footprint():
            return _written_by_one_kernel((gate_up, d_hidden, lr_3), torch.empty_like(gate_up), torch.empty_like(d_hidden))
        if gate_up.is_cuda:
            return _kernels().writing_factors(gate_up, d_hidden, lr_3)
        (gate, up), (lr0, lr1, lr2) = gate_up.chunk(2, -1), lr_3.unsqueeze(-1).unbind(-2)
        silu, slope, _ = _silu_and_slope(gate)
        left = torch.cat((d_hidden * up * slope * lr0, d_hidden * silu * lr2), -1)
        return left.to(gate.dtype), (silu * up * lr1).to(gate.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_left, grad_right):
        gate_up, d_hidden, lr_3 = ctx.saved_tensors
        if wants_gpu_footprint():
            given = (gate_up, d_hidden, lr_3)
            return _written_by_one_kernel((*given, grad_left, grad_right), *map(torch.empty_like, given))
        if gate_up.is_cuda:
            return _kernels().writing_factors_gradient(gate_up, d_hidden, lr_3, grad_left, grad_right)
        (gate, up), (lr0, lr1, lr2) = gate_up.chunk(2, -1), lr_3.unsqueeze(-1).unbind(-2)
        (grad0, grad2), grad1 = grad_left.chunk(2, -1), grad_right
        silu, slope, sigma = _silu_and_slope(gate)
        curvature = sigma * (1 - sigma) * (2 + gate * (1 - 2 * sigma))  # second derivative of SiLU
        d_up = d_hidden * up
        grad_lr = torch.stack(((grad0 * d_up * slope).sum(-1), (grad1 * silu * up).sum(-1), (grad2 * d_hidden * silu).sum(-1)), -1)
        grad0, grad1, grad2 = grad0 * lr0, grad1 * lr1, grad2 * lr2
        grad_gate = grad0 * d_up * curvature + (grad1 * up + grad2 * d_hidden) * slope
        grad_gate_up = torch.cat((grad_gate, grad0 * d_hidden * slope + grad1 * silu), -1)
        grad_d_hidden = grad0 * up * slope + grad2 * silu
        return grad_gate_up.to(gate.dtype), grad_d_hidden.to(gate.dtype), grad_lr.to(lr_3.dtype)


class _Rescaled(torch.autograd.Function):
    """Returns what is to be kept, and the rescaled sum if that is another tensor."""

    @staticmethod
    def forward(ctx, weights, change, lengths, keep, read_dtype):
        ctx.set_materialize_grads(False)
        ctx.num_weights, ctx.change_dtype, ctx.keep = weights.shape[0], None if change is None else change.dtype, keep
        dtypes = [weights.dtype] if keep == "rescaled" else []
        if read_dtype not in dtypes:
            dtypes.append(read_dtype)
        if wants_gpu_footprint():
            like = weights if change is None else change
            outputs = [torch.empty_like(like, dtype=dtype) for dtype in (weights.dtype, *dtypes)]
            total, *read = _written_by_one_kernel((weights, change, lengths), *outputs)
        elif weights.is_cuda:
            total, *read = _kernels().added_and_rescaled(weights, change, lengths, dtypes)
        else:
            total = weights if change is None else weights + change
            wide = total / (total.norm(dim=-1, keepdim=True) + ROW_EPS) * lengths
            read = [wide.to(dtype) for dtype in dtypes]
        ctx.save_for_backward(total, lengths)
        found = (total, *read) if keep == "sum" else tuple(read)
        return found if len(found) > 1 else found[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        total, lengths = ctx.saved_tensors
        grad_total, grads_read = (grads[0], grads[1:]) if ctx.keep == "sum" else (None, grads)
        grads_read = [grad for grad in grads_read if grad is not None]
        if not grads_read:
            grad_weights = grad_change = grad_total
            grad_lengths = None
        elif wants_gpu_footprint():
            found = torch.empty_like(total), torch.empty_like(total, dtype=ctx.change_dtype), torch.empty_like(total[..., :1])
            grad_weights, grad_change, grad_lengths = _written_by_one_kernel((total, lengths, *grads), *found)
        elif total.is_cuda:
            grad_weights, grad_change, grad_lengths = _kernels().rescaled_gradient(total, lengths, grad_total, grads_read, ctx.change_dtype)
        else:
            grad_read, norm = sum(grads_read[1:], grads_read[0]).to(total.dtype), total.norm(dim=-1, keepdim=True)
            scale = lengths / (norm + ROW_EPS)
            grad_lengths = (grad_read * total).sum(-1, keepdim=True) / (norm + ROW_EPS)
            along = grad_lengths * scale / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            grad_weights = torch.addcmul(grad_read * scale, total, along, value=-1)
            grad_change = grad_weights = grad_weights if grad_total is None else grad_weights + grad_total
        # The weights and the lengths of one sequence serve all.
        if grad_weights is not None and ctx.num_weights < total.shape[0]:
            grad_weights = grad_weights.sum(0, keepdim=True)
        if grad_lengths is not None and lengths.shape[0] < total.shape[0]:
            grad_lengths = grad_lengths.sum(0, keepdim=True)
        if grad_change is not None:
            grad_change = None if ctx.change_dtype is None else grad_change.to(ctx.change_dtype)
        return grad_weights, grad_change, grad_lengths, None, None


def _silu_and_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SiLU, its derivative, and the sigmoid."""
    sigma = x.sigmoid()
    return x * sigma, sigma * (1 + x * (1 - sigma)), sigma


def _kernels() -> ModuleType:
    """The kernels of a GPU; triton is not on every machine without one."""
    from refine_kernels.lact import elementwise_kernels

    return elementwise_kernels


def _written_by_one_kernel(inputs: Sequence[torch.Tensor | None], *outputs: torch.Tensor):
    """Reports that one kernel reads the inputs and writes the outputs; values mean nothing."""
    report_traffic(sum(x.nbytes for x in (*inputs, *outputs) if x is not None), 1)
    return outputs if len(outputs) > 1 else outputs[0]


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
