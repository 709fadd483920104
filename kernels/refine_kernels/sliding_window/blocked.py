"""Sliding-window attention in blocks of queries, each with the keys that its queries can see.

torch's own scaled_dot_product_attention runs on every device; the blocks make its cost T times (window + block) instead of
T squared. Legend: T rows, N sequences, R rows of a pool of past and present keys, H heads, D channels of a head, W window, B block
of queries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.packing import PlannedTensor, cached_plan
from refine_kernels.rows import own_rows

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
    """Outputs `[T, H, D]`.

    Args:
        q_THD: queries of N packed sequences.
        keys_RHD, values_RHD: of every sequence `past_counts` rows of its past, then its own.
        window: rows that a query sees, its own included.
    """
    H, D = q_THD.shape[1:]
    plan, device = _plan(cu_seqlens, window, past_counts), q_THD.device
    query_rows, key_rows = plan.query_rows.on(device), plan.key_rows.on(device)
    q = q_THD.index_select(0, query_rows.flatten()).view(*query_rows.shape, H, D)
    k, v = (x.index_select(0, key_rows.flatten()).view(*key_rows.shape, H, D) for x in (keys_RHD, values_RHD))
    mask = plan.visible.on(device)[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, plan.slot_of_row.on(device))


class _Plan(NamedTuple):
    """Rows of the blocks; padding points at row 0.

    `query_rows` [blocks, B], `key_rows` [blocks, B + W - 1] into past and present rows, `visible` [blocks, B, B + W - 1],
    `slot_of_row` [T] in the flattened blocks.
    """

    query_rows: PlannedTensor
    key_rows: PlannedTensor
    visible: PlannedTensor
    slot_of_row: PlannedTensor


@cached_plan(maxsize=16)
def _plan(cu_seqlens: tuple[int, ...], window: int, past_counts: tuple[int, ...]) -> _Plan:
    spans = list(zip(cu_seqlens, cu_seqlens[1:]))
    W = window
    B = min(max(end - start for start, end in spans), max(W, MIN_BLOCK))
    own = own_rows(cu_seqlens, past_counts)

    query_rows, key_rows, visible, slots = [], [], [], []
    query, key = torch.arange(B)[:, None], torch.arange(B + W - 1)
    in_window = (key >= query) & (key < query + W)
    for n, (start, end) in enumerate(spans):
        for block_start in range(0, end - start, B):
            length = min(B, end - start - block_start)
            slots.append(len(query_rows) * B + torch.arange(length))
            query_rows.append((start + block_start + torch.arange(B)).where(torch.arange(B) < length, 0))
            place = block_start - (W - 1) + key  # counted from the sequence's first row; past rows are negative
            exists = (place >= -past_counts[n]) & (place < end - start)
            key_rows.append((own[n] + place).where(exists, 0))
            block_visible = in_window & exists
            block_visible[length:, 0] = True  # padded queries: softmax over nothing would be NaN
            visible.append(block_visible)
    return _Plan(*map(PlannedTensor, (torch.stack(query_rows), torch.stack(key_rows), torch.stack(visible), torch.cat(slots))))
