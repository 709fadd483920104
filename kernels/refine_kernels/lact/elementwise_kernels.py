"""The operations that LaCT applies per token around its matrix products, in Triton.

Forward and backward each read every input once and write every output once; backward computes the intermediate values again.
README.md has the maths.
Legend: T tokens, N vectors (tokens times heads), H heads, D channels of a head, M hidden channels of the fast network.
"""

import torch
import triton
import triton.language as tl

from refine_kernels.lact.constants import UNIT_EPS

# Elements of each of its tensors that a program holds in registers.
BLOCK_ELEMENTS, NUM_WARPS = 2048, 4
# Tokens over which one program sums the gradients of scale and offset.
SUMMED_TOKENS = 128


@triton.jit
def _silu_and_slope(x):
    sigma = 1 / (1 + tl.exp(-x))
    return x * sigma, sigma * (1 + x * (1 - sigma)), sigma


@triton.jit
def _unit_kernel(
    x,
    scales,
    offsets,
    y,
    T,
    H,
    D: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    first, head = tl.program_id(0).to(tl.int64) * BT, tl.program_id(1)
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    in_d = o_d < D
    b_scale = tl.load(scales + head * D + o_d, mask=in_d, other=0.0).to(ACC)
    b_offset = tl.load(offsets + head * D + o_d, mask=in_d, other=0.0).to(ACC)
    inside = (o_t < (T - first).to(tl.int32))[:, None] & in_d[None, :]
    o_x = (first * H + head) * D + o_t[:, None] * (H * D) + o_d[None, :]
    b_a = tl.load(x + o_x, mask=inside, other=0.0).to(ACC) * b_scale[None, :] + b_offset[None, :]
    if SILU:
        b_a, _, _ = _silu_and_slope(b_a)
    length = tl.sqrt(tl.sum(b_a * b_a, axis=1))
    tl.store(y + o_x, (b_a / (length + EPS)[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unit_gradient_kernel(
    x,
    scales,
    offsets,
    grad_y,
    grad_x,
    grad_scale,
    grad_offset,
    T,
    H,
    D: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    SUMMED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of SUMMED tokens of one head, and their part of the gradients of scale and offset."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    in_d = o_d < D
    b_scale = tl.load(scales + head * D + o_d, mask=in_d, other=0.0).to(ACC)
    b_offset = tl.load(offsets + head * D + o_d, mask=in_d, other=0.0).to(ACC)
    scale_sum, offset_sum = tl.zeros([BD], dtype=ACC), tl.zeros([BD], dtype=ACC)
    for i in range(SUMMED // BT):
        first = block * SUMMED + i * BT
        inside = (o_t < (T - first).to(tl.int32))[:, None] & in_d[None, :]
        o_x = (first * H + head) * D + o_t[:, None] * (H * D) + o_d[None, :]
        b_x = tl.load(x + o_x, mask=inside, other=0.0).to(ACC)
        b_z = b_x * b_scale[None, :] + b_offset[None, :]
        b_a = b_z
        if SILU:
            b_a, slope, _ = _silu_and_slope(b_z)
        b_grad = tl.load(grad_y + o_x, mask=inside, other=0.0).to(ACC)
        length = tl.sqrt(tl.sum(b_a * b_a, axis=1))
        along = tl.sum(b_a * b_grad, axis=1) / tl.maximum(length, 1e-30) / (length + EPS)
        b_grad = (b_grad - b_a * along[:, None]) / (length + EPS)[:, None]
        if SILU:
            b_grad = b_grad * slope
        tl.store(grad_x + o_x, (b_grad * b_scale[None, :]).to(grad_x.dtype.element_ty), mask=inside)
        b_grad = tl.where(inside, b_grad, 0.0)
        scale_sum += tl.sum(b_grad * b_x, axis=0)
        offset_sum += tl.sum(b_grad, axis=0)
    o_sum = (block * H + head) * D + o_d
    tl.store(grad_scale + o_sum, scale_sum, mask=in_d)
    tl.store(grad_offset + o_sum, offset_sum, mask=in_d)


@triton.jit
def _factors_block(N, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Offsets and mask of this program's block of vectors, then of the block of their learning rates."""
    first = tl.program_id(0).to(tl.int64) * BN
    o_n, o_m = tl.arange(0, BN), tl.arange(0, BM)
    in_n = o_n < (N - first).to(tl.int32)
    inside = in_n[:, None] & (o_m < M)[None, :]
    return first * M + o_n[:, None] * M + o_m[None, :], inside, first * 3 + o_n * 3, in_n


@triton.jit
def _factors_kernel(gate, up, d_hidden, lr, out0, out1, out2, N, M: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    o_x, inside, o_lr, in_n = _factors_block(N, M, BN, BM)
    silu, slope, _ = _silu_and_slope(tl.load(gate + o_x, mask=inside, other=0.0).to(ACC))
    b_up = tl.load(up + o_x, mask=inside, other=0.0).to(ACC)
    b_d = tl.load(d_hidden + o_x, mask=inside, other=0.0).to(ACC)
    lr0 = tl.load(lr + o_lr, mask=in_n, other=0.0).to(ACC)[:, None]
    lr1 = tl.load(lr + o_lr + 1, mask=in_n, other=0.0).to(ACC)[:, None]
    lr2 = tl.load(lr + o_lr + 2, mask=in_n, other=0.0).to(ACC)[:, None]
    tl.store(out0 + o_x, (b_d * b_up * slope * lr0).to(out0.dtype.element_ty), mask=inside)
    tl.store(out1 + o_x, (silu * b_up * lr1).to(out1.dtype.element_ty), mask=inside)
    tl.store(out2 + o_x, (b_d * silu * lr2).to(out2.dtype.element_ty), mask=inside)


@triton.jit
def _factors_gradient_kernel(
    gate,
    up,
    d_hidden,
    lr,
    grad0,
    grad1,
    grad2,
    grad_gate,
    grad_up,
    grad_d_hidden,
    grad_lr,
    N,
    M: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    o_x, inside, o_lr, in_n = _factors_block(N, M, BN, BM)
    b_gate = tl.load(gate + o_x, mask=inside, other=0.0).to(ACC)
    silu, slope, sigma = _silu_and_slope(b_gate)
    b_up = tl.load(up + o_x, mask=inside, other=0.0).to(ACC)
    b_d = tl.load(d_hidden + o_x, mask=inside, other=0.0).to(ACC)
    b_0 = tl.load(grad0 + o_x, mask=inside, other=0.0).to(ACC)
    b_1 = tl.load(grad1 + o_x, mask=inside, other=0.0).to(ACC)
    b_2 = tl.load(grad2 + o_x, mask=inside, other=0.0).to(ACC)
    tl.store(grad_lr + o_lr, tl.sum(b_0 * b_d * b_up * slope, axis=1), mask=in_n)
    tl.store(grad_lr + o_lr + 1, tl.sum(b_1 * silu * b_up, axis=1), mask=in_n)
    tl.store(grad_lr + o_lr + 2, tl.sum(b_2 * b_d * silu, axis=1), mask=in_n)
    b_0 *= tl.load(lr + o_lr, mask=in_n, other=0.0).to(ACC)[:, None]
    b_1 *= tl.load(lr + o_lr + 1, mask=in_n, other=0.0).to(ACC)[:, None]
    b_2 *= tl.load(lr + o_lr + 2, mask=in_n, other=0.0).to(ACC)[:, None]
    curvature = sigma * (1 - sigma) * (2 + b_gate * (1 - 2 * sigma))  # second derivative of SiLU
    b_grad = b_0 * b_d * b_up * curvature + (b_1 * b_up + b_2 * b_d) * slope
    tl.store(grad_gate + o_x, b_grad.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + o_x, (b_0 * b_d * slope + b_1 * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_d_hidden + o_x, (b_0 * b_up * slope + b_2 * silu).to(grad_d_hidden.dtype.element_ty), mask=inside)


class UnitVectors(torch.autograd.Function):
    """Same contract as `elementwise.unit_vectors`; the arithmetic is at least float32."""

    @staticmethod
    def forward(ctx, x_THD, scale_HD, offset_HD, silu):
        x_THD, scale_HD, offset_HD = x_THD.contiguous(), scale_HD.contiguous(), offset_HD.contiguous()
        ctx.save_for_backward(x_THD, scale_HD, offset_HD)
        ctx.silu = silu
        T, H, D = x_THD.shape
        y_THD, constants = torch.empty_like(x_THD), _unit_constants(x_THD, silu)
        _unit_kernel[triton.cdiv(T, constants["BT"]), H](x_THD, scale_HD, offset_HD, y_THD, T, H, D, **constants)
        return y_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        x_THD, scale_HD, offset_HD = ctx.saved_tensors
        T, H, D = x_THD.shape
        constants, blocks = _unit_constants(x_THD, ctx.silu), triton.cdiv(T, SUMMED_TOKENS)
        grad_x = torch.empty_like(x_THD)
        # Partial sums instead of atomic additions: every run gives the same bits.
        parts = x_THD.new_empty(2, blocks, H, D, dtype=torch.promote_types(x_THD.dtype, torch.float32))
        _unit_gradient_kernel[blocks, H](
            x_THD, scale_HD, offset_HD, grad_THD.contiguous(), grad_x, *parts, T, H, D, SUMMED=SUMMED_TOKENS, **constants
        )
        grad_scale, grad_offset = parts.sum(1)
        return grad_x, grad_scale.to(scale_HD.dtype), grad_offset.to(offset_HD.dtype), None


class WritingFactors(torch.autograd.Function):
    """Same contract as `elementwise.writing_factors`; the arithmetic is at least float32."""

    @staticmethod
    def forward(ctx, gate, up, d_hidden, lr_3):
        inputs = [x.contiguous() for x in (gate, up, d_hidden, lr_3)]
        ctx.save_for_backward(*inputs)
        outs, constants = [torch.empty_like(inputs[0]) for _ in range(3)], _factors_constants(gate)
        N = gate.numel() // gate.shape[-1]
        _factors_kernel[(triton.cdiv(N, constants["BN"]),)](*inputs, *outs, N, **constants)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        gate, constants = inputs[0], _factors_constants(inputs[0])
        found = [torch.empty_like(x) for x in inputs]
        N = gate.numel() // gate.shape[-1]
        grads = [grad.contiguous() for grad in grads]
        _factors_gradient_kernel[(triton.cdiv(N, constants["BN"]),)](*inputs, *grads, *found, N, **constants)
        return tuple(found)


def _unit_constants(x_THD: torch.Tensor, silu: bool) -> dict:
    BT, BD = block_sizes(x_THD.shape[2], SUMMED_TOKENS)
    return dict(SILU=silu, EPS=UNIT_EPS, ACC=_accumulator(x_THD), BT=BT, BD=BD, num_warps=NUM_WARPS)


def _factors_constants(gate: torch.Tensor) -> dict:
    BN, BM = block_sizes(gate.shape[-1], BLOCK_ELEMENTS)
    return dict(M=gate.shape[-1], ACC=_accumulator(gate), BN=BN, BM=BM, num_warps=NUM_WARPS)


def block_sizes(channels: int, max_vectors: int) -> tuple[int, int]:
    """Vectors of a program's block, and their channels rounded up to a power of two."""
    padded = triton.next_power_of_2(channels)
    return min(max(1, BLOCK_ELEMENTS // padded), max_vectors), padded


def _accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
