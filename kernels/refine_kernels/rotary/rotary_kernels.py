"""The rotation of rotary positions in Triton: the input is read once, the output written once. README.md has the maths.

Legend: T tokens, H heads, D channels of a head, R = D / 2.
"""

import torch
import triton
import triton.language as tl

# Pairs of channels that a program rotates: enough bytes in flight without spilling registers.
BLOCK_PAIRS, NUM_WARPS = 2048, 4
MAX_HEADS = 16


@triton.jit
def _rotation_kernel(
    x,
    cos,
    sin,
    y,
    T,
    H,
    R: tl.constexpr,
    BACK: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BT
    o_t, o_h, o_r = tl.arange(0, BT), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BR)
    in_t = o_t < (T - first).to(tl.int32)
    in_table = in_t[:, None] & (o_r < R)[None, :]
    table = first * R + o_t[:, None] * R + o_r[None, :]
    b_cos = tl.load(cos + table, mask=in_table, other=1.0).to(ACC)[:, None, :]
    b_sin = tl.load(sin + table, mask=in_table, other=0.0).to(ACC)[:, None, :]
    if BACK:
        b_sin = -b_sin
    inside = in_t[:, None, None] & (o_h < H)[None, :, None] & (o_r < R)[None, None, :]
    o_x = (o_t[:, None, None] * H + o_h[None, :, None]) * (2 * R) + o_r[None, None, :]
    x += first * H * (2 * R)
    y += first * H * (2 * R)
    b_a = tl.load(x + o_x, mask=inside, other=0.0).to(ACC)
    b_b = tl.load(x + o_x + R, mask=inside, other=0.0).to(ACC)
    tl.store(y + o_x, (b_a * b_cos - b_b * b_sin).to(y.dtype.element_ty), mask=inside)
    tl.store(y + o_x + R, (b_a * b_sin + b_b * b_cos).to(y.dtype.element_ty), mask=inside)


class TritonRotation(torch.autograd.Function):
    """Same contract as the plain torch form: takes `x_THD`, `cos_TR`, `sin_TR`, returns the rotated `x_THD`."""

    @staticmethod
    def forward(ctx, x_THD, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        return _launch(x_THD, cos_TR, sin_TR, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        return _launch(grad_THD, *ctx.saved_tensors, back=True), None, None


def _launch(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, *, back: bool) -> torch.Tensor:
    x_THD = x_THD.contiguous()
    y_THD = torch.empty_like(x_THD)
    (T, H, _), blocks = x_THD.shape, block_sizes(x_THD.shape[1], cos_TR.shape[1])
    accumulator = tl.float64 if cos_TR.dtype == torch.float64 else tl.float32
    grid = (triton.cdiv(T, blocks["BT"]), triton.cdiv(H, blocks["BH"]))
    _rotation_kernel[grid](x_THD, cos_TR, sin_TR, y_THD, T, H, R=cos_TR.shape[1], BACK=back, ACC=accumulator, **blocks, num_warps=NUM_WARPS)
    return y_THD


def block_sizes(num_heads: int, pairs: int) -> dict[str, int]:
    """Tokens, heads and pairs of channels of a program's block; all heads of a token share its cosines and sines."""
    BR = triton.next_power_of_2(pairs)
    BH = min(triton.next_power_of_2(num_heads), MAX_HEADS, max(1, BLOCK_PAIRS // BR))
    return {"BT": max(1, BLOCK_PAIRS // (BH * BR)), "BH": BH, "BR": BR}
