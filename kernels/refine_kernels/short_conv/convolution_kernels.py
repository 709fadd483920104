"""The convolution in Triton: forward and backward read the extended stream (tokens with their windows in front) once each.

Plain torch reads every input once per tap of the filter and once more for SiLU. README.md has the maths.
Legend: E tokens of the extended stream, R = E - W + 1 outputs, D channels, W filter width.
"""

import torch
import triton
import triton.language as tl

# The largest block of which a multiprocessor runs three at once in backward; with four times as many elements registers spill.
BLOCK_TOKENS, BLOCK_CHANNELS, NUM_WARPS = 16, 64, 4
# Channels of a program while decoding, where it has a single token.
STEP_CHANNELS = 256


@triton.jit
def _correlated(x, weight, o_r, o_d, R, D, W: tl.constexpr, ACC: tl.constexpr):
    """`sum_j weight[d, j] x[r + j, d]` for the outputs r in o_r, counted from `x`; 0 outside 0..R-1."""
    inside = ((o_r >= 0) & (o_r < R))[:, None] & (o_d < D)[None, :]
    total = tl.zeros([o_r.shape[0], o_d.shape[0]], dtype=ACC)
    for j in tl.static_range(W):
        tap = tl.load(weight + o_d * W + j, mask=o_d < D, other=0.0).to(ACC)
        total += tl.load(x + (o_r + j)[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(ACC) * tap[None, :]
    return total


@triton.jit
def _forward_kernel(
    x,
    weight,
    tokens,
    y,
    R,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_d = tl.arange(0, BR), tl.program_id(1) * BD + tl.arange(0, BD)
    left = (R - first).to(tl.int32)
    total = _correlated(x + first * D, weight, o_r, o_d, left, D, W, ACC)
    if SILU:
        total = total / (1 + tl.exp(-total))
    token, inside = first + o_r, o_r < left
    if PACKED:
        token = tl.load(tokens + token, mask=inside, other=-1).to(tl.int64)
        inside = token >= 0
    tl.store(y + token[:, None] * D + o_d[None, :], total.to(y.dtype.element_ty), mask=inside[:, None] & (o_d < D)[None, :])


@triton.jit
def _backward_kernel(
    x,
    weight,
    tokens,
    grad_y,
    grad_x,
    grad_taps,
    R,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of a block of inputs, each from the W outputs that read it, and this block's part of the filter's gradient."""
    first = tl.program_id(0).to(tl.int64) * BR
    o_r, o_d = tl.arange(0, BR), tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = (o_d < D)[None, :]
    # Indices are relative to the block's first token: outputs reach W - 1 tokens back, but not before the stream's first.
    earliest, left = (-first).to(tl.int32), (R - first).to(tl.int32)
    x += first * D
    total = tl.zeros([BR, BD], dtype=ACC)
    for j in tl.static_range(W):
        outputs = o_r - j
        in_r = (outputs >= earliest) & (outputs < left)
        inside = in_r[:, None] & in_d
        token = first + outputs
        if PACKED:
            token = tl.load(tokens + token, mask=in_r, other=-1).to(tl.int64)
            in_r = token >= 0
        grad = tl.load(grad_y + token[:, None] * D + o_d[None, :], mask=in_r[:, None] & in_d, other=0.0).to(ACC)
        if SILU:
            # Counted from j tokens before the block, so that outputs of the block before have indices from 0 too.
            shift = tl.where(first >= j, j, 0)
            before = _correlated(x - shift * D, weight, outputs + shift, o_d, left + shift, D, W, ACC)
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
    """The next output of one sequence; the token enters the window, whose oldest token leaves."""
    n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = o_d < D
    window += n * (W - 1) * D
    total = tl.zeros([BD], dtype=ACC)
    for j in tl.static_range(W):
        if j < W - 1:
            token = tl.load(window + j * D + o_d, mask=in_d, other=0.0)
        else:
            token = tl.load(x + n * D + o_d, mask=in_d, other=0.0)
        total += token.to(ACC) * tl.load(weight + o_d * W + j, mask=in_d, other=0.0).to(ACC)
        if j > 0:
            tl.store(window + (j - 1) * D + o_d, token.to(window.dtype.element_ty), mask=in_d)
    if SILU:
        total = total / (1 + tl.exp(-total))
    tl.store(y + n * D + o_d, total.to(y.dtype.element_ty), mask=in_d)


def run_step(window_NWD: torch.Tensor, x_ND: torch.Tensor, weight_DW: torch.Tensor, silu: bool) -> torch.Tensor:
    """Same contract as `refine_kernels.short_conv.step.short_conv_step_`."""
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
    """Computes `y_e = sum_j weight_j x_{e+j}`, then SiLU if `silu`; summed in at least float32, SiLU recomputed in backward.

    Takes `x_ED`, `weight_DW`, and `plan`, which says what output each token has and which tokens of x to keep. Returns outputs `[T, D]` and
    the kept tokens of x, whose gradient backward adds to x's, in x's dtype.
    """

    @staticmethod
    def forward(ctx, x_ED, weight_DW, silu, plan):
        x_ED, weight_DW = x_ED.contiguous(), weight_DW.contiguous()
        ctx.save_for_backward(x_ED, weight_DW)
        ctx.silu, ctx.plan = silu, plan
        (E, D), W = x_ED.shape, weight_DW.shape[1]
        y, R = x_ED.new_empty(plan.num_tokens, D), E - W + 1
        _forward_kernel[_grid((R, D))](x_ED, weight_DW, _tokens(plan, x_ED), y, R, D, **_constants(x_ED, W, silu, plan))
        return y, plan.kept.read(x_ED)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_kept):
        x_ED, weight_DW = ctx.saved_tensors
        (E, D), W, plan = x_ED.shape, weight_DW.shape[1], ctx.plan
        grid = _grid(x_ED.shape)
        grad_x = torch.empty_like(x_ED)
        # Partial sums instead of atomic additions: every run gives the same bits.
        parts = x_ED.new_empty(grid[0], W, D, dtype=torch.promote_types(x_ED.dtype, torch.float32))
        given = x_ED, weight_DW, _tokens(plan, x_ED), grad_y.contiguous()
        _backward_kernel[grid](*given, grad_x, parts, E - W + 1, D, **_constants(x_ED, W, ctx.silu, plan))
        plan.kept.add_gradients_(grad_x, grad_kept)
        return grad_x, parts.sum(0).t().to(weight_DW.dtype), None, None


def _tokens(plan, x: torch.Tensor) -> torch.Tensor | None:
    return None if plan.token_of_output is None else plan.token_of_output.on(x.device)


def _grid(shape: torch.Size) -> tuple[int, int]:
    return triton.cdiv(shape[0], BLOCK_TOKENS), triton.cdiv(shape[1], BLOCK_CHANNELS)


def _constants(x_ED: torch.Tensor, width: int, silu: bool, plan) -> dict:
    return dict(
        W=width,
        SILU=silu,
        PACKED=plan.token_of_output is not None,
        ACC=_accumulator(x_ED),
        BR=BLOCK_TOKENS,
        BD=BLOCK_CHANNELS,
        num_warps=NUM_WARPS,
    )


def _accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
