"""Sliding-window attention in blocks of queries, each with the keys that its queries can see.

torch's scaled_dot_product_attention runs on every device; with blocks it costs T times (window + block) instead of T squared.
Legend: T tokens, N sequences, R tokens of a pool of past and present keys, H heads, D channels of a head, W window, B block of queries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.packing import PlannedTensor, cached_plan
from refine_kernels.past_tokens import own_starts

# Shorter blocks than this would spend more on gathering keys than on attending to them.
MIN_BLOCK = 64


def blocked_attention(
    q_THD: torch.Tensor,
    keys_RHD: torch.Tensor,
    values_RHD: torch.Tensor,
    cu_seqlens: tuple[int, ...],
    past_counts: tuple[int, ...],
    window: int,
) -> torch.Tensor:
    """Returns outputs `[T, H, D]`.

    Args:
        q_THD: queries of N packed sequences.
        keys_RHD, values_RHD: for every sequence, `past_counts` past tokens and then its own.
        window: number of tokens that a query sees, its own included.
    """
    H, D = q_THD.shape[1:]
    plan, device = _plan(cu_seqlens, window, past_counts), q_THD.device
    queries, keys = plan.queries.on(device), plan.keys.on(device)
    q = q_THD.index_select(0, queries.flatten()).view(*queries.shape, H, D)
    k, v = (x.index_select(0, keys.flatten()).view(*keys.shape, H, D) for x in (keys_RHD, values_RHD))
    mask = plan.visible.on(device)[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, plan.slot_of_token.on(device))


class _Plan(NamedTuple):
    """Index tensors of the blocks; padding has index 0.

    Attributes:
        queries: tokens of each block, `[blocks, B]`.
        keys: indices into the pool of the keys that each block needs, `[blocks, B + W - 1]`.
        visible: whether a query sees a key, `[blocks, B, B + W - 1]`.
        slot_of_token: index of each token in the flattened blocks, `[T]`.
    """

    queries: PlannedTensor
    keys: PlannedTensor
    visible: PlannedTensor
    slot_of_token: PlannedTensor


@cached_plan(maxsize=16)
def _plan(cu_seqlens: tuple[int, ...], window: int, past_counts: tuple[int, ...]) -> _Plan:
    spans = list(zip(cu_seqlens, cu_seqlens[1:]))
    W = window
    B = min(max(end - start for start, end in spans), max(W, MIN_BLOCK))
    own = own_starts(cu_seqlens, past_counts)

    queries, keys, visible, slots = [], [], [], []
    query, key = torch.arange(B)[:, None], torch.arange(B + W - 1)
    in_window = (key >= query) & (key < query + W)
    for n, (start, end) in enumerate(spans):
        for block_start in range(0, end - start, B):
            length = min(B, end - start - block_start)
            slots.append(len(queries) * B + torch.arange(length))
            queries.append((start + block_start + torch.arange(B)).where(torch.arange(B) < length, 0))
            token = block_start - (W - 1) + key  # counted from the sequence's first token; past tokens are negative
            exists = (token >= -past_counts[n]) & (token < end - start)
            keys.append((own[n] + token).where(exists, 0))
            block_visible = in_window & exists
            block_visible[length:, 0] = True  # padded queries: a softmax over no key would be NaN
            visible.append(block_visible)
    return _Plan(*map(PlannedTensor, (torch.stack(queries), torch.stack(keys), torch.stack(visible), torch.cat(slots))))
