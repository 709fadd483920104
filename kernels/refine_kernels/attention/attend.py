"""Softmax attention over packed sequences, which may continue from past tokens that other sequences share.

Legend: T tokens, N sequences, H query heads, K key heads, D channels of a head, R tokens of a pool.
"""

from collections.abc import Sequence

import torch

from refine_kernels.attention.buckets import BucketedAttention
from refine_kernels.attention.intervals import flash_attention, interval_attention
from refine_kernels.attention.plan import as_bounds, units
from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.packing import check_packing
from refine_kernels.past_tokens import TokenSpans

MAX_HEAD_CHANNELS = 256
MIN_CAPABILITY = (8, 0)


def attention(
    q_THD: torch.Tensor,
    k_RKD: torch.Tensor,
    v_RKD: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    past: tuple[TokenSpans, TokenSpans] | None = None,
) -> torch.Tensor:
    """Lets each token attend to its sequence's past and to its sequence's tokens up to itself; scores are scaled by `1 / sqrt(D)`.

    Keys and values of a past are referred to, not copied, so memory grows with the tokens of the pools. Differentiable in every tensor,
    those of the pools included; a pool of which nothing is read gets a gradient of zeros.

    Args:
        q_THD: queries of T tokens in N packed sequences; q and k already encode positions.
        k_RKD, v_RKD: keys and values of the same tokens. R - T further ones may stand before them, to which the first sequence attends,
            too. H is a multiple of K: each key head serves a group of neighbouring query heads.
        cu_seqlens: N + 1 token indices at which the sequences begin and end, as host integers.
        past: keys and values from which each sequence continues; None for none.

    Returns:
        Outputs `[T, H, D]`.

    Raises:
        ValueError: `cu_seqlens` does not cover the tokens, heads do not divide, or D is above 256.
    """
    cu_seqlens = tuple(cu_seqlens)
    check_packing(cu_seqlens, q_THD.shape[0], ())
    if q_THD.shape[1] % k_RKD.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q_THD.shape[1]} and {k_RKD.shape[1]}")
    if q_THD.shape[2] > MAX_HEAD_CHANNELS:
        raise ValueError(f"a head has {q_THD.shape[2]} channels; allowed: up to {MAX_HEAD_CHANNELS}")
    seen = k_RKD.shape[0] - q_THD.shape[0]
    on_gpu = is_for_gpu(q_THD)
    if past is None and on_gpu and can_flash(q_THD):
        return flash_attention(q_THD, k_RKD, v_RKD, cu_seqlens)

    keys, values = past or (None, None)
    pools = [x for pair in zip(keys.pools, values.pools) for x in pair] if past else []
    bounds = as_bounds(keys.bounds) if past else ()
    if seen:
        # The tokens before the first sequence's own are one more pool of its past.
        pools += [k_RKD[:seen], v_RKD[:seen]]
        own = [((0, seen),)] + [((0, 0),)] * (len(cu_seqlens) - 2)
        bounds = tuple(spans + mine for spans, mine in zip(bounds or [()] * len(own), own))
        k_RKD, v_RKD = k_RKD[seen:], v_RKD[seen:]
    pools = tuple(x.to(q_THD.dtype) for x in (*pools, k_RKD, v_RKD))
    if on_gpu:
        return interval_attention(q_THD, pools, cu_seqlens, bounds)
    return BucketedAttention.apply(units(cu_seqlens, bounds), q_THD, *pools)


def is_for_gpu(x: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU, or is to be treated as if it were (`gpu_footprint`)."""
    return x.is_cuda or wants_gpu_footprint()


def can_flash(q_THD: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these queries on a GPU."""
    able = not q_THD.is_cuda or torch.cuda.get_device_capability(q_THD.device) >= MIN_CAPABILITY
    return able and q_THD.dtype in (torch.bfloat16, torch.float16) and q_THD.shape[2] % 8 == 0
