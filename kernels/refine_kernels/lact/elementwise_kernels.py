"""The operations that LaCT applies around its matrix products, in Triton.

Forward and backward each read every input once and write every output once; backward computes the intermediate values again.
README.md has the maths.
Legend: T tokens, N vectors (tokens times heads; rows of weights), H heads, D channels of a head, M hidden channels of the fast network.
"""

import torch
import triton
import triton.language as tl

from refine_kernels.lact.constants import ROW_EPS, UNIT_EPS

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
def _vectors(N, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """This program's first vector, the offsets of its elements and of their vectors from there, and masks of both."""
    first = tl.program_id(0).to(tl.int64) * BN
    o_n, o_m = tl.arange(0, BN), tl.arange(0, BM)
    in_n = o_n < (N - first).to(tl.int32)
    return first, o_n[:, None], o_m[None, :], in_n[:, None] & (o_m < M)[None, :], in_n


@triton.jit
def _hidden_kernel(gate_up, out, N, M: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    first, o_n, o_m, inside, _ = _vectors(N, M, BN, BM)
    gate_up += first * 2 * M + o_n * 2 * M + o_m
    silu, _, _ = _silu_and_slope(tl.load(gate_up, mask=inside, other=0.0).to(ACC))
    b_up = tl.load(gate_up + M, mask=inside, other=0.0).to(ACC)
    tl.store(out + first * M + o_n * M + o_m, (silu * b_up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient_kernel(gate_up, grad, grad_gate_up, N, M: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    first, o_n, o_m, inside, _ = _vectors(N, M, BN, BM)
    gate_up += first * 2 * M + o_n * 2 * M + o_m
    grad_gate_up += first * 2 * M + o_n * 2 * M + o_m
    silu, slope, _ = _silu_and_slope(tl.load(gate_up, mask=inside, other=0.0).to(ACC))
    b_up = tl.load(gate_up + M, mask=inside, other=0.0).to(ACC)
    b_grad = tl.load(grad + first * M + o_n * M + o_m, mask=inside, other=0.0).to(ACC)
    tl.store(grad_gate_up, (b_grad * b_up * slope).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + M, (b_grad * silu).to(grad_gate_up.dtype.element_ty), mask=inside)


@triton.jit
def _factors_kernel(gate_up, d_hidden, lr, left, right, N, M: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    first, o_n, o_m, inside, in_n = _vectors(N, M, BN, BM)
    gate_up += first * 2 * M + o_n * 2 * M + o_m
    left += first * 2 * M + o_n * 2 * M + o_m
    silu, slope, _ = _silu_and_slope(tl.load(gate_up, mask=inside, other=0.0).to(ACC))
    b_up = tl.load(gate_up + M, mask=inside, other=0.0).to(ACC)
    b_d = tl.load(d_hidden + first * M + o_n * M + o_m, mask=inside, other=0.0).to(ACC)
    lr += first * 3 + o_n * 3
    lr0 = tl.load(lr, mask=in_n[:, None], other=0.0).to(ACC)
    lr1 = tl.load(lr + 1, mask=in_n[:, None], other=0.0).to(ACC)
    lr2 = tl.load(lr + 2, mask=in_n[:, None], other=0.0).to(ACC)
    tl.store(left, (b_d * b_up * slope * lr0).to(left.dtype.element_ty), mask=inside)
    tl.store(left + M, (b_d * silu * lr2).to(left.dtype.element_ty), mask=inside)
    tl.store(right + first * M + o_n * M + o_m, (silu * b_up * lr1).to(right.dtype.element_ty), mask=inside)


@triton.jit
def _factors_gradient_kernel(
    gate_up,
    d_hidden,
    lr,
    grad_left,
    grad_right,
    grad_gate_up,
    grad_d_hidden,
    grad_lr,
    N,
    M: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    first, o_n, o_m, inside, in_n = _vectors(N, M, BN, BM)
    o_x, o_2x = first * M + o_n * M + o_m, first * 2 * M + o_n * 2 * M + o_m
    b_gate = tl.load(gate_up + o_2x, mask=inside, other=0.0).to(ACC)
    silu, slope, sigma = _silu_and_slope(b_gate)
    b_up = tl.load(gate_up + o_2x + M, mask=inside, other=0.0).to(ACC)
    b_d = tl.load(d_hidden + o_x, mask=inside, other=0.0).to(ACC)
    b_0 = tl.load(grad_left + o_2x, mask=inside, other=0.0).to(ACC)
    b_1 = tl.load(grad_right + o_x, mask=inside, other=0.0).to(ACC)
    b_2 = tl.load(grad_left + o_2x + M, mask=inside, other=0.0).to(ACC)
    o_lr = first * 3 + tl.arange(0, BN) * 3
    tl.store(grad_lr + o_lr, tl.sum(b_0 * b_d * b_up * slope, axis=1), mask=in_n)
    tl.store(grad_lr + o_lr + 1, tl.sum(b_1 * silu * b_up, axis=1), mask=in_n)
    tl.store(grad_lr + o_lr + 2, tl.sum(b_2 * b_d * silu, axis=1), mask=in_n)
    b_0 *= tl.load(lr + o_lr, mask=in_n, other=0.0).to(ACC)[:, None]
    b_1 *= tl.load(lr + o_lr + 1, mask=in_n, other=0.0).to(ACC)[:, None]
    b_2 *= tl.load(lr + o_lr + 2, mask=in_n, other=0.0).to(ACC)[:, None]
    curvature = sigma * (1 - sigma) * (2 + b_gate * (1 - 2 * sigma))  # second derivative of SiLU
    b_grad = b_0 * b_d * b_up * curvature + (b_1 * b_up + b_2 * b_d) * slope
    tl.store(grad_gate_up + o_2x, b_grad.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + o_2x + M, (b_0 * b_d * slope + b_1 * silu).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_d_hidden + o_x, (b_0 * b_up * slope + b_2 * silu).to(grad_d_hidden.dtype.element_ty), mask=inside)


@triton.jit
def _rescale_kernel(
    weights,
    change,
    lengths,
    total,
    read,
    also_read,
    N,
    OWN,
    ROWS,
    M: tl.constexpr,
    EPS: tl.constexpr,
    HAS_CHANGE: tl.constexpr,
    READ_TWICE: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """Rows of weights: those of `weights` begin again after OWN, their lengths after ROWS."""
    first, o_n, o_m, inside, in_n = _vectors(N, M, BN, BM)
    row = first + o_n
    o_x = first * M + o_n * M + o_m
    b_w = tl.load(weights + row % OWN * M + o_m, mask=inside, other=0.0).to(ACC)
    if HAS_CHANGE:
        b_w += tl.load(change + o_x, mask=inside, other=0.0).to(ACC)
        tl.store(total + o_x, b_w.to(total.dtype.element_ty), mask=inside)
    norm = tl.sqrt(tl.sum(b_w * b_w, axis=1))[:, None]
    b_length = tl.load(lengths + row % ROWS, mask=in_n[:, None], other=0.0).to(ACC)
    b_w = b_w / (norm + EPS) * b_length
    tl.store(read + o_x, b_w.to(read.dtype.element_ty), mask=inside)
    if READ_TWICE:
        tl.store(also_read + o_x, b_w.to(also_read.dtype.element_ty), mask=inside)


@triton.jit
def _rescale_gradient_kernel(
    total,
    lengths,
    grad_total,
    grad_read,
    also_grad_read,
    grad_weights,
    grad_change,
    grad_lengths,
    N,
    ROWS,
    M: tl.constexpr,
    EPS: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    READ_TWICE: tl.constexpr,
    HAS_CHANGE: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    first, o_n, o_m, inside, in_n = _vectors(N, M, BN, BM)
    row = first + o_n
    o_x = first * M + o_n * M + o_m
    b_w = tl.load(total + o_x, mask=inside, other=0.0).to(ACC)
    b_grad = tl.load(grad_read + o_x, mask=inside, other=0.0).to(ACC)
    if READ_TWICE:
        b_grad += tl.load(also_grad_read + o_x, mask=inside, other=0.0).to(ACC)
    norm = tl.sqrt(tl.sum(b_w * b_w, axis=1))[:, None]
    found = tl.sum(b_grad * b_w, axis=1)[:, None] / (norm + EPS)
    tl.store(grad_lengths + row, found.to(grad_lengths.dtype.element_ty), mask=in_n[:, None])
    scale = tl.load(lengths + row % ROWS, mask=in_n[:, None], other=0.0).to(ACC) / (norm + EPS)
    b_grad = b_grad * scale - b_w * (found * scale / tl.maximum(norm, 1e-30))
    if HAS_TOTAL:
        b_grad += tl.load(grad_total + o_x, mask=inside, other=0.0).to(ACC)
    tl.store(grad_weights + o_x, b_grad.to(grad_weights.dtype.element_ty), mask=inside)
    if HAS_CHANGE:
        tl.store(grad_change + o_x, b_grad.to(grad_change.dtype.element_ty), mask=inside)


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


def hidden(gate_up: torch.Tensor) -> torch.Tensor:
    """Same contract as `elementwise.hidden`; like all functions below, without a graph."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    grid, constants = _launch(out)
    _hidden_kernel[grid](gate_up, out, **constants)
    return out


def hidden_gradient(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of `gate_up`."""
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    grid, constants = _launch(grad)
    _hidden_gradient_kernel[grid](gate_up, grad, grad_gate_up, **constants)
    return grad_gate_up


def writing_factors(gate_up: torch.Tensor, d_hidden: torch.Tensor, lr_3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `elementwise.writing_factors`; the arithmetic is at least float32."""
    gate_up, d_hidden, lr_3 = gate_up.contiguous(), d_hidden.contiguous(), lr_3.contiguous()
    left, right = torch.empty_like(gate_up), torch.empty_like(d_hidden)
    grid, constants = _launch(d_hidden)
    _factors_kernel[grid](gate_up, d_hidden, lr_3, left, right, **constants)
    return left, right


def writing_factors_gradient(
    gate_up: torch.Tensor, d_hidden: torch.Tensor, lr_3: torch.Tensor, grad_left: torch.Tensor, grad_right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the three inputs."""
    given = [x.contiguous() for x in (gate_up, d_hidden, lr_3)]
    grads = [x.contiguous() for x in (grad_left, grad_right)]
    found = tuple(map(torch.empty_like, given))
    grid, constants = _launch(d_hidden)
    _factors_gradient_kernel[grid](*given, *grads, *found, **constants)
    return found


def added_and_rescaled(
    weights: torch.Tensor, change: torch.Tensor | None, lengths: torch.Tensor, dtypes: list[torch.dtype]
) -> list[torch.Tensor]:
    """The sum of weights and change, in the dtype of the weights, and the rescaled sum in one or two dtypes."""
    weights, lengths = weights.contiguous(), lengths.contiguous()
    change = None if change is None else change.contiguous()
    shape = weights.shape if change is None else change.shape
    read = [weights.new_empty(shape, dtype=dtype) for dtype in dtypes]
    total = weights if change is None else weights.new_empty(shape)
    grid, constants = _launch(total)
    rows = dict(OWN=weights.numel() // shape[-1], ROWS=lengths.numel(), EPS=ROW_EPS, HAS_CHANGE=change is not None)
    _rescale_kernel[grid](weights, change, lengths, total, read[0], read[-1], READ_TWICE=len(read) > 1, **rows, **constants)
    return [total, *read]


def rescaled_gradient(
    total: torch.Tensor,
    lengths: torch.Tensor,
    grad_total: torch.Tensor | None,
    grads_read: list[torch.Tensor],
    change_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the weights, of the change in its dtype, and of each row's length; a sum has the gradient of both its terms."""
    total, lengths, grads_read = total.contiguous(), lengths.contiguous(), [grad.contiguous() for grad in grads_read]
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_weights, grad_lengths = torch.empty_like(total), total.new_empty(*total.shape[:-1], 1)
    in_two = change_dtype not in (None, total.dtype)
    grad_change = torch.empty_like(total, dtype=change_dtype) if in_two else grad_weights
    grid, constants = _launch(total)
    given = total, lengths, grad_total, grads_read[0], grads_read[-1]
    rows = dict(ROWS=lengths.numel(), EPS=ROW_EPS, HAS_TOTAL=grad_total is not None, READ_TWICE=len(grads_read) > 1, HAS_CHANGE=in_two)
    _rescale_gradient_kernel[grid](*given, grad_weights, grad_change, grad_lengths, **rows, **constants)
    return grad_weights, grad_change, grad_lengths


def _unit_constants(x_THD: torch.Tensor, silu: bool) -> dict:
    BT, BD = block_sizes(x_THD.shape[2], SUMMED_TOKENS)
    return dict(SILU=silu, EPS=UNIT_EPS, ACC=_accumulator(x_THD), BT=BT, BD=BD, num_warps=NUM_WARPS)


def _launch(x: torch.Tensor) -> tuple[tuple[int], dict]:
    """Grid and arguments of a kernel that takes the vectors of `x`."""
    M = x.shape[-1]
    BN, BM = block_sizes(M, BLOCK_ELEMENTS)
    N = x.numel() // M
    return (triton.cdiv(N, BN),), dict(N=N, M=M, ACC=_accumulator(x), BN=BN, BM=BM, num_warps=NUM_WARPS)


def block_sizes(channels: int, max_vectors: int) -> tuple[int, int]:
    """Vectors of a program's block, and their channels rounded up to a power of two."""
    padded = triton.next_power_of_2(channels)
    return min(max(1, BLOCK_ELEMENTS // padded), max_vectors), padded


def _accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
