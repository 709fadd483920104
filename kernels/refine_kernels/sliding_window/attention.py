"""Sliding-window attention over packed sequences, which may continue from a window of past keys and values.

Legend: T tokens, N sequences, R tokens of a pool of past and present keys, H heads, D channels of a head, W window, P positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.packing import cached_plan, check_packing
from refine_kernels.past_tokens import LastTokens, host_tensor, joined, own_starts, position_array, sequences_before
from refine_kernels.sliding_window.blocked import blocked_attention
from refine_kernels.sliding_window.flash import can_flash, flash_attention


class WindowedAttention(NamedTuple):
    """Outputs, and the windows at the wanted positions.

    Attributes:
        out_THD: outputs.
        keys, values: for each position r the W - 1 keys and values up to and including token r - 1, as indices into the pool of past
            and present tokens. If the sequence has fewer tokens, the first of them are arbitrary.
    """

    out_THD: torch.Tensor
    keys: LastTokens
    values: LastTokens


def sliding_window_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: Sequence[int],
    window: int,
    *,
    past: tuple[LastTokens, LastTokens] | None = None,
    past_lengths: Sequence[int] = (),
    window_positions: Sequence[int] = (),
) -> WindowedAttention:
    """Lets each token attend to the last `window` tokens of its sequence, itself included; scores are scaled by `1 / sqrt(D)`.

    On a GPU, 16-bit inputs run torch's flash attention; everything else runs blocks of torch's scaled_dot_product_attention.

    Args:
        q_THD, k_THD, v_THD: queries, keys and values of T tokens in N packed sequences; q and k already encode positions.
        cu_seqlens: N + 1 token indices at which the sequences begin and end, as host integers.
        window: W, at least 1.
        past: the W - 1 keys and values before the first token of each of the first sequences; None for none.
        past_lengths: how many tokens each of those sequences has had before; at most so many of its past are read.
        window_positions: P positions r in 1..T whose windows are wanted.

    Raises:
        ValueError: `cu_seqlens` does not cover the tokens, a position lies outside, or the window is below 1.
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
    return WindowedAttention(out, *(LastTokens(x, ends, window - 1) for x in (keys, values)))


@cached_plan(maxsize=16)
def _window_ends(
    cu_seqlens: tuple[int, ...], num_tokens: int, past_counts: tuple[int, ...], positions: tuple[int, ...] | range
) -> torch.Tensor:
    """Pool index after the last token of each position's window, `[P]`."""
    check_packing(cu_seqlens, num_tokens, positions)
    r = position_array(positions)
    shift_N = np.array([in_pool - start for in_pool, start in zip(own_starts(cu_seqlens, past_counts), cu_seqlens)])
    return host_tensor(r + shift_N[sequences_before(r, cu_seqlens)])
