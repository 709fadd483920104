"""Sliding-window attention in blocks of queries, each with the keys that its queries can see.

torch's own scaled_dot_product_attention runs on every device; the blocks make its cost T times (window + block) instead of
T squared. Legend: T rows, N sequences, H heads, D channels of a head, W window, B block of queries, P positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from refine_kernels.packing import PlannedTensor, cached_plan, check_packing
from refine_kernels.rows import LastRows, host_tensor, joined, own_rows, places, sequences_before

# Shorter blocks than this would spend more on gathering keys than on attending to them.
MIN_BLOCK = 64


class WindowedAttention(NamedTuple):
    """Outputs `[T, H, D]`, and the windows of wanted positions: W - 1 keys and values, up to and including row r - 1, as rows of
    all that was attended to. Where the sequence is shorter, the first of them are any rows."""

    out_THD: torch.Tensor
    keys: LastRows
    values: LastRows


def sliding_window_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: Sequence[int],
    window: int,
    *,
    past: tuple[LastRows, LastRows] | None = None,
    past_lengths: Sequence[int] = (),
    window_positions: Sequence[int] = (),
) -> WindowedAttention:
    """Each row attends to the `window` last rows of its sequence, itself included, scores scaled by `1 / sqrt(D)`.

    Args:
        q_THD, k_THD, v_THD: rows of N packed sequences; positions are already encoded in q and k.
        cu_seqlens: N + 1 row indices at which the sequences begin and end, as host integers.
        past: W - 1 keys and values before the first row of each of the first sequences; None for none.
        past_lengths: how many rows each of those sequences has had before; of the past, the last so many are read.
        window_positions: P row indices r in 1..T whose windows are wanted.

    Raises:
        ValueError: if `cu_seqlens` does not cover the rows, a position lies outside, or the window is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; allowed: at least 1")
    T, H, D = q_THD.shape
    counts = [min(length, window - 1) for length in past_lengths] if past is not None else []
    counts += [0] * (len(cu_seqlens) - 1 - len(counts))
    plan = _plan(tuple(cu_seqlens), T, window, tuple(counts), _key(window_positions))
    past_keys, past_values = past or (None, None)
    keys, values = joined(k_THD, cu_seqlens, past_keys, counts), joined(v_THD, cu_seqlens, past_values, counts)

    device = q_THD.device
    query_rows, key_rows = plan.query_rows.on(device), plan.key_rows.on(device)
    q = q_THD.index_select(0, query_rows.flatten()).view(*query_rows.shape, H, D)
    k, v = (x.index_select(0, key_rows.flatten()).view(*key_rows.shape, H, D) for x in (keys, values))
    mask = plan.visible.on(device)[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    out = out.transpose(1, 2).flatten(0, 1).index_select(0, plan.slot_of_row.on(device))
    return WindowedAttention(out, *(LastRows(x, plan.window_ends, window - 1) for x in (keys, values)))


def _key(positions: Sequence[int]) -> tuple[int, ...] | range:
    return positions if isinstance(positions, range) else tuple(positions)


class _Plan(NamedTuple):
    """Rows of the blocks; padding points at row 0.

    `query_rows` [blocks, B], `key_rows` [blocks, B + W - 1] into past and present rows, `visible` [blocks, B, B + W - 1],
    `slot_of_row` [T] in the flattened blocks, `window_ends` [P] in past and present rows.
    """

    query_rows: PlannedTensor
    key_rows: PlannedTensor
    visible: PlannedTensor
    slot_of_row: PlannedTensor
    window_ends: torch.Tensor


@cached_plan(maxsize=16)
def _plan(
    cu_seqlens: tuple[int, ...],
    num_rows: int,
    window: int,
    past_counts: tuple[int, ...],
    window_positions: tuple[int, ...] | range,
) -> _Plan:
    check_packing(cu_seqlens, num_rows, window_positions)
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
    positions = places(window_positions)
    moved = np.array([pool_row - start for pool_row, start in zip(own, cu_seqlens)])
    window_ends = host_tensor(positions + moved[sequences_before(positions, cu_seqlens)])
    on_device = (torch.stack(query_rows), torch.stack(key_rows), torch.stack(visible), torch.cat(slots))
    return _Plan(*map(PlannedTensor, on_device), window_ends)
