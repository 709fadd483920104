"""Sliding-window attention by torch's flash attention for packed sequences, which computes only the products inside the window.

Legend: T tokens, N sequences, R tokens of a pool of past and present keys, H heads, D channels of a head.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from refine_kernels.packing import PlannedTensor, cached_plan

MIN_CAPABILITY = (8, 0)
MAX_HEAD_CHANNELS = 256


def can_flash(q_THD: torch.Tensor, assumed: bool = False) -> bool:
    """Whether the kernel takes such queries. `assumed` treats them as on a GPU that has the kernel, wherever they are."""
    on_device = assumed or (q_THD.is_cuda and torch.cuda.get_device_capability(q_THD.device) >= MIN_CAPABILITY)
    is_16_bit = q_THD.dtype in (torch.bfloat16, torch.float16)
    return on_device and is_16_bit and q_THD.shape[2] % 8 == 0 and q_THD.shape[2] <= MAX_HEAD_CHANNELS


def flash_attention(
    q_THD: torch.Tensor,
    keys_RHD: torch.Tensor,
    values_RHD: torch.Tensor,
    cu_seqlens: tuple[int, ...],
    past_counts: tuple[int, ...],
    window: int,
) -> torch.Tensor:
    """Same contract as `refine_kernels.sliding_window.blocked.blocked_attention`."""
    plan = _plan(cu_seqlens, past_counts)
    device = q_THD.device
    # The kernel aligns the last query with the last key: where there are more keys than queries, the first keys are past ones.
    # Its window size does not count a query's own token.
    return varlen_attn(
        q_THD,
        keys_RHD.to(q_THD.dtype),
        values_RHD.to(q_THD.dtype),
        plan.query_starts.on(device),
        plan.key_starts.on(device),
        plan.max_queries,
        plan.max_keys,
        window_size=(window - 1, 0),
    )


class _Plan(NamedTuple):
    """The borders of each sequence's queries and keys, int32 `[N + 1]`, and the largest number of them in a sequence."""

    query_starts: PlannedTensor
    key_starts: PlannedTensor
    max_queries: int
    max_keys: int


@cached_plan(maxsize=16)
def _plan(cu_seqlens: tuple[int, ...], past_counts: tuple[int, ...]) -> _Plan:
    queries = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    keys = [length + past for length, past in zip(queries, past_counts)]
    starts = (PlannedTensor(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)) for lengths in (queries, keys))
    return _Plan(*starts, max(queries), max(keys))
