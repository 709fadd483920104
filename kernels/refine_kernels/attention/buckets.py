"""Attention on a CPU: torch's flash kernel on views of the pools, one unit of tokens at a time.

The output of a token is the average of the values of all parts that it attends to, weighted by exponentials of scores. Each part gives
its own average and the logarithm of its sum of exponentials, from which the whole follows. Backward does not need the output of a part:
from output and log-sum of the whole the kernel computes the gradients of each part. So no key is copied and no result of a part is kept.
Legend: T tokens, H query heads, K key heads, D channels of a head, R tokens of a pool.
"""

import math

import torch

from refine_kernels.attention.plan import Part, Unit

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class BucketedAttention(torch.autograd.Function):
    """`apply(units, q_THD, *pools)` returns outputs `[T, H, D]`; `pools` are keys and values of every pool in turn, `[R, K, D]` each."""

    @staticmethod
    def forward(ctx, units: tuple[Unit, ...], q_THD: torch.Tensor, *pools: torch.Tensor) -> torch.Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        log_sums_TH = q_THD.new_empty(q_THD.shape[:2], dtype=wide)
        for unit in units:
            q = unit.take(q_THD)
            found = [_attend(q, part, pools) for part in unit.parts]
            if len(found) == 1:
                out, log_sums = found[0]
            else:
                log_sums = torch.stack([part_log_sums for _, part_log_sums in found]).logsumexp(0)
                out = sum(part_out.to(wide) * (part_log_sums - log_sums).exp()[..., None] for part_out, part_log_sums in found)
            unit.put(out_THD, out.to(out_THD.dtype))
            unit.put(log_sums_TH, log_sums)
        ctx.units = units
        ctx.save_for_backward(q_THD, out_THD, log_sums_TH, *pools)
        return out_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        q_THD, out_THD, log_sums_TH, *pools = ctx.saved_tensors
        grad_q_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        grad_pools = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in pools]
        for unit in ctx.units:
            q, out, log_sums, grad = (unit.take(x) for x in (q_THD, out_THD, log_sums_TH, grad_THD))
            grad_q = 0
            for part in unit.parts:
                k, v = (x[part.first : part.end] for x in pools[2 * part.pool : 2 * part.pool + 2])
                inputs = [_heads_first(x) for x in (grad, q, k, v, out, log_sums[..., None])]
                inputs[-1] = inputs[-1].squeeze(-1)
                grads = _backward(*inputs, 0.0, part.causal, attn_mask=_mask(part, q))
                grad_q = grad_q + _tokens_first(grads[0])
                for total, found in zip(grad_pools[2 * part.pool : 2 * part.pool + 2], grads[1:]):
                    total[part.first : part.end] += _tokens_first(found)
            unit.put(grad_q_THD, grad_q)
        return None, grad_q_THD, *grad_pools


def _attend(q: torch.Tensor, part: Part, pools: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[tokens, H, D]` and log-sums `[tokens, H]` of one part; minus infinity for a token that sees nothing of it."""
    k, v = (x[part.first : part.end] for x in pools[2 * part.pool : 2 * part.pool + 2])
    out, log_sums = _forward(*(_heads_first(x) for x in (q, k, v)), 0.0, part.causal, attn_mask=_mask(part, q))
    out, log_sums = _tokens_first(out), log_sums[0].T
    if part.limits is not None:
        lower, upper = part.limits.on(q.device).unbind(1)
        log_sums = log_sums.masked_fill((lower >= upper)[:, None], -math.inf)
    return out, log_sums


def _mask(part: Part, q: torch.Tensor) -> torch.Tensor | None:
    """The numbers that the kernel adds to the scores: 0 for visible keys, minus infinity for others; None without a mask."""
    visible = part.mask(q.device)
    if visible is None:
        return None
    return q.new_zeros(visible.shape).masked_fill_(~visible, -math.inf)[None, None]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Turns `[tokens, heads, D]` into `[1, heads, tokens, D]`."""
    return x.transpose(0, 1)[None]


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """Turns `[1, heads, tokens, D]` into `[tokens, heads, D]`."""
    return x[0].transpose(0, 1)
