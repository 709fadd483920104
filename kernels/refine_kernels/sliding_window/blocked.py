"""Sliding-window attention in blocks of queries, each with the keys that its queries can see.

torch's own scaled_dot_product_attention runs on every device; the blocks make its cost T times (window + block) instead of
T squared. Legend: T rows, N sequences, H heads, D channels of a head, W window, B block of queries, P positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.packing import PlannedTensor, cached_plan, check_packing, sequence_of_token

# Shorter blocks than this would spend more on gathering keys than on attending to them.
MIN_BLOCK = 64


class WindowedAttention(NamedTuple):
    """Outputs, and where the windows of wanted positions lie: their keys are `keys[window_rows]`.

    Attributes:
        out_THD: attention outputs.
        keys, values: all rows that were attended to, `[past rows + T, H, D]`.
        window_rows: `[P, W - 1]`, the last W - 1 rows up to and including row r - 1, oldest first; where the sequence is
            shorter, any row.
    """

    out_THD: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    window_rows: torch.Tensor


def sliding_window_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: Sequence[int],
    window: int,
    *,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    past_lengths: Sequence[int] | None = None,
    window_positions: Sequence[int] = (),
) -> WindowedAttention:
    """Each row attends to the `window` last rows of its sequence, itself included, scores scaled by `1 / sqrt(D)`.

    Args:
        q_THD, k_THD, v_THD: rows of N packed sequences; positions are already encoded in q and k.
        cu_seqlens: N + 1 row indices at which the sequences begin and end, as host integers.
        past: keys and values before the first row of the first P sequences, each `[P, W - 1, H, D]`, right-aligned; None for
            none.
        past_lengths: how many rows each of those sequences has had before; of the past, the last so many are read.
        window_positions: P row indices r in 1..T whose windows are wanted.

    Raises:
        ValueError: if `cu_seqlens` does not cover the rows, a position lies outside, or the window is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; allowed: at least 1")
    T, H, D = q_THD.shape
    lengths = tuple(past_lengths) if past is not None else None
    plan = _plan(tuple(cu_seqlens), T, window, lengths, tuple(window_positions))
    keys, values = k_THD, v_THD
    if past is not None:
        keys, values = (torch.cat([old.flatten(0, 1).to(new.dtype), new]) for old, new in zip(past, (k_THD, v_THD)))

    device = q_THD.device
    query_rows, key_rows = plan.query_rows.on(device), plan.key_rows.on(device)
    q = q_THD.index_select(0, query_rows.flatten()).view(*query_rows.shape, H, D)
    k, v = (x.index_select(0, key_rows.flatten()).view(*key_rows.shape, H, D) for x in (keys, values))
    mask = plan.visible.on(device)[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    out = out.transpose(1, 2).flatten(0, 1).index_select(0, plan.slot_of_row.on(device))
    return WindowedAttention(out, keys, values, plan.window_rows)


class _Plan(NamedTuple):
    """Rows of the blocks; padding points at row 0.

    `query_rows` [blocks, B], `key_rows` [blocks, B + W - 1] into past and present rows, `visible` [blocks, B, B + W - 1],
    `slot_of_row` [T] in the flattened blocks, `window_rows` [P, W - 1].
    """

    query_rows: PlannedTensor
    key_rows: PlannedTensor
    visible: PlannedTensor
    slot_of_row: PlannedTensor
    window_rows: torch.Tensor


@cached_plan(maxsize=16)
def _plan(
    cu_seqlens: tuple[int, ...],
    num_rows: int,
    window: int,
    past_lengths: tuple[int, ...] | None,
    window_positions: tuple[int, ...],
) -> _Plan:
    check_packing(cu_seqlens, num_rows, window_positions)
    spans = list(zip(cu_seqlens, cu_seqlens[1:]))
    W = window
    B = min(max(end - start for start, end in spans), max(W, MIN_BLOCK))
    past_lengths = past_lengths or ()
    num_past_rows = len(past_lengths) * (W - 1)

    def rows_of(n: int, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of places counted from sequence n's first row (negative: past), and whether they exist."""
        start, end = spans[n]
        num_past = min(past_lengths[n], W - 1) if n < len(past_lengths) else 0
        exists = (local >= -num_past) & (local < end - start)
        rows = torch.where(local < 0, (n + 1) * (W - 1) + local, num_past_rows + start + local)
        return rows.where(exists, 0), exists

    query_rows, key_rows, visible, slots = [], [], [], []
    query, key = torch.arange(B)[:, None], torch.arange(B + W - 1)
    in_window = (key >= query) & (key < query + W)
    for n, (start, end) in enumerate(spans):
        for block_start in range(0, end - start, B):
            length = min(B, end - start - block_start)
            slots.append(len(query_rows) * B + torch.arange(length))
            query_rows.append((start + block_start + torch.arange(B)).where(torch.arange(B) < length, 0))
            rows, exists = rows_of(n, block_start - (W - 1) + key)
            key_rows.append(rows)
            block_visible = in_window & exists
            block_visible[length:, 0] = True  # padded queries: softmax over nothing would be NaN
            visible.append(block_visible)
    windows = []
    for r in window_positions:
        n = sequence_of_token(cu_seqlens, r - 1)
        windows.append(rows_of(n, r - spans[n][0] - (W - 1) + torch.arange(W - 1))[0])
    window_rows = torch.stack(windows) if windows else torch.zeros(0, W - 1, dtype=torch.long)
    on_device = (torch.stack(query_rows), torch.stack(key_rows), torch.stack(visible), torch.cat(slots))
    return _Plan(*map(PlannedTensor, on_device), window_rows)
