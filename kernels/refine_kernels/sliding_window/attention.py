"""Sliding-window attention over packed sequences that may go on from a window of past keys and values.

Legend: T rows, N sequences, R rows of a pool of past and present keys, H heads, D channels of a head, W window, P positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.packing import cached_plan, check_packing
from refine_kernels.rows import LastRows, host_tensor, joined, own_rows, places, sequences_before
from refine_kernels.sliding_window.blocked import blocked_attention
from refine_kernels.sliding_window.flash import can_flash, flash_attention


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

    Runs torch's flash attention for 16-bit rows on a GPU, and blocks of its scaled_dot_product_attention elsewhere.

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
    cu_seqlens = tuple(cu_seqlens)
    counts = [min(length, window - 1) for length in past_lengths] if past is not None else []
    counts = (*counts, *[0] * (len(cu_seqlens) - 1 - len(counts)))
    positions = window_positions if isinstance(window_positions, range) else tuple(window_positions)
    ends = _window_ends(cu_seqlens, q_THD.shape[0], counts, positions)
    past_keys, past_values = past or (None, None)
    keys, values = joined(k_THD, cu_seqlens, past_keys, counts), joined(v_THD, cu_seqlens, past_values, counts)
    attention = flash_attention if can_flash(q_THD, assumed=wants_gpu_footprint()) else blocked_attention
    out = attention(q_THD, keys, values, cu_seqlens, counts, window)
    return WindowedAttention(out, *(LastRows(x, ends, window - 1) for x in (keys, values)))


@cached_plan(maxsize=16)
def _window_ends(
    cu_seqlens: tuple[int, ...], num_rows: int, past_counts: tuple[int, ...], positions: tuple[int, ...] | range
) -> torch.Tensor:
    """In past and present rows, `[P]`."""
    check_packing(cu_seqlens, num_rows, positions)
    at = places(positions)
    moved = np.array([pool_row - start for pool_row, start in zip(own_rows(cu_seqlens, past_counts), cu_seqlens)])
    return host_tensor(at + moved[sequences_before(at, cu_seqlens)])
