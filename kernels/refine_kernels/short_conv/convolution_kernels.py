"""The convolution over an extended stream in Triton, forward and backward in one pass over the rows each.

A sum of shifted products in plain torch moves every row once a tap and again for SiLU. README.md has the maths.
Legend: E rows of the extended stream, R = E - W + 1 rows of outputs, D channels, W filter width.
"""

import torch
import triton
import triton.language as tl

# The largest block whose backward leaves room for three of them on a multiprocessor; four times as many elements spill.
BLOCK_ROWS, BLOCK_CHANNELS, NUM_WARPS = 16, 64, 4
# Of one row while decoding.
STEP_CHANNELS = 256


@triton.jit
def _correlated(x, weight, o_r, o_d, R, D, W: tl.constexpr, ACC: tl.constexpr):
    """`sum_j weight[d, j] x[r + j, d]` at rows o_r relative to `x`; 0 outside 0..R-1."""
    inside = ((o_r >= 0) & (o_r < R))[:, None] & (o_d < D)[None, :]
    total = tl.zeros([o_r.shape[0], o_d.shape[0]], dtype=ACC)
    for j in tl.static_range(W):
        tap = tl.load(weight + o_d * W + j, mask=o_d < D, other=0.0).to(ACC)
        total += tl.load(x + (o_r + j)[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(ACC) * tap[None, :]
    return total


@triton.jit
def _forward_kernel(x, weight, y, R, D, W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_d = tl.arange(0, BR), tl.program_id(1) * BD + tl.arange(0, BD)
    left = (R - first).to(tl.int32)
    total = _correlated(x + first * D, weight, o_r, o_d, left, D, W, ACC)
    if SILU:
        total = total / (1 + tl.exp(-total))
    tl.store(
        y + first * D + o_r[:, None] * D + o_d[None, :],
        total.to(y.dtype.element_ty),
        mask=(o_r < left)[:, None] & (o_d < D)[None, :],
    )


@triton.jit
def _backward_kernel(
    x,
    weight,
    grad_y,
    grad_x,
    grad_taps,
    R,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of a block of inputs, from the W outputs that read each; of the taps, this block's outputs' part."""
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_d = tl.arange(0, BR), tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = (o_d < D)[None, :]
    # Rows relative to the block's first: outputs reach W - 1 rows back, but not before the stream's first.
    earliest, left = (-first).to(tl.int32), (R - first).to(tl.int32)
    x += first * D
    grad_y += first * D
    total = tl.zeros([BR, BD], dtype=ACC)
    for j in tl.static_range(W):
        rows = o_r - j
        inside = ((rows >= earliest) & (rows < left))[:, None] & in_d
        grad = tl.load(grad_y + rows[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(ACC)
        if SILU:
            # Relative to the row j before the block, so that rows of the block before are rows of the stream here too.
            shift = tl.where(first >= j, j, 0)
            before = _correlated(x - shift * D, weight, rows + shift, o_d, left + shift, D, W, ACC)
            gate = 1 / (1 + tl.exp(-before))
            grad = grad * gate * (1 + before * (1 - gate))
        tap = tl.load(weight + o_d * W + j, mask=o_d < D, other=0.0).to(ACC)
        total += grad * tap[None, :]
        if j == 0:
            for i in tl.static_range(W):
                read = tl.load(x + (o_r + i)[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(ACC)
                part = tl.sum(grad * read, axis=0)
                tl.store(grad_taps + (tl.program_id(0).to(tl.int64) * W + i) * D + o_d, part, mask=o_d < D)
    in_x = (o_r < left + W - 1)[:, None] & in_d
    tl.store(grad_x + first * D + o_r[:, None] * D + o_d[None, :], total.to(grad_x.dtype.element_ty), mask=in_x)


@triton.jit
def _step_kernel(window, x, weight, y, D, W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr):
    """The next output of one sequence; its row joins the window, whose first one leaves."""
    n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = o_d < D
    window += n * (W - 1) * D
    total = tl.zeros([BD], dtype=ACC)
    for j in tl.static_range(W):
        if j < W - 1:
            row = tl.load(window + j * D + o_d, mask=in_d, other=0.0)
        else:
            row = tl.load(x + n * D + o_d, mask=in_d, other=0.0)
        total += row.to(ACC) * tl.load(weight + o_d * W + j, mask=in_d, other=0.0).to(ACC)
        if j > 0:
            tl.store(window + (j - 1) * D + o_d, row.to(window.dtype.element_ty), mask=in_d)
    if SILU:
        total = total / (1 + tl.exp(-total))
    tl.store(y + n * D + o_d, total.to(y.dtype.element_ty), mask=in_d)


def run_step(window_NWD: torch.Tensor, x_ND: torch.Tensor, weight_DW: torch.Tensor, silu: bool) -> torch.Tensor:
    """Contract as `refine_kernels.short_conv.step.short_conv_step_`."""
    if not window_NWD.is_contiguous():
        raise ValueError(f"the windows must be contiguous, got strides {window_NWD.stride()} for {tuple(window_NWD.shape)}")
    x_ND, weight_DW = x_ND.contiguous(), weight_DW.contiguous()
    (N, D), W = x_ND.shape, weight_DW.shape[1]
    y = torch.empty_like(x_ND)
    _step_kernel[N, triton.cdiv(D, STEP_CHANNELS)](
        window_NWD, x_ND, weight_DW, y, D, W=W, SILU=silu, ACC=_accumulator(x_ND), BD=STEP_CHANNELS, num_warps=NUM_WARPS
    )
    return y


class Convolution(torch.autograd.Function):
    """`y_e = sum_j weight_j x_{e+j}`, then SiLU if asked for; summed in at least float32, SiLU recomputed in backward.

    Shapes: `x_ED`, `weight_DW`; returns `[E - W + 1, D]` and the given rows of x, whose gradient is added where they are, in its dtype.
    """

    @staticmethod
    def forward(ctx, x_ED, weight_DW, silu, rows):
        x_ED, weight_DW = x_ED.contiguous(), weight_DW.contiguous()
        ctx.save_for_backward(x_ED, weight_DW, rows)
        ctx.silu = silu
        (E, D), W = x_ED.shape, weight_DW.shape[1]
        y = x_ED.new_empty(E - W + 1, D)
        _forward_kernel[_grid(y.shape)](x_ED, weight_DW, y, y.shape[0], D, **_constants(x_ED, W, silu))
        return y, x_ED.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_rows):
        x_ED, weight_DW, rows = ctx.saved_tensors
        (E, D), W = x_ED.shape, weight_DW.shape[1]
        grid = _grid(x_ED.shape)
        grad_x = torch.empty_like(x_ED)
        # Summed here and not by atomics: the same bits in every run.
        parts = x_ED.new_empty(grid[0], W, D, dtype=torch.promote_types(x_ED.dtype, torch.float32))
        _backward_kernel[grid](x_ED, weight_DW, grad_y.contiguous(), grad_x, parts, E - W + 1, D, **_constants(x_ED, W, ctx.silu))
        # A row of overlapping windows has several gradients, which index_add_ would add by atomics.
        grad_x.index_put_((rows,), grad_rows, accumulate=True)
        return grad_x, parts.sum(0).t().to(weight_DW.dtype), None, None


def _grid(shape: torch.Size) -> tuple[int, int]:
    return triton.cdiv(shape[0], BLOCK_ROWS), triton.cdiv(shape[1], BLOCK_CHANNELS)


def _constants(x_ED: torch.Tensor, width: int, silu: bool) -> dict:
    return dict(W=width, SILU=silu, ACC=_accumulator(x_ED), BR=BLOCK_ROWS, BD=BLOCK_CHANNELS, num_warps=NUM_WARPS)


def _accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
