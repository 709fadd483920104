"""Attention on a GPU: torch's flash attention for packed sequences, and compiled flex attention for sequences with a past.

Flex attention runs once per pool, with the queries of all sequences against the whole pool; a block mask names the blocks that some
query sees. This file makes the masks from intervals, without looking at every pair of tokens. The outputs of the pools are averaged with
weights from their log-sums, with gradient through both.
Legend: T tokens, H query heads, K key heads, D channels of a head, R tokens of a pool.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.varlen import varlen_attn

from refine_kernels.attention.footprint import flex_footprint
from refine_kernels.attention.plan import Bounds, intervals, sorted_sequences
from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.packing import PlannedTensor, cached_plan

BLOCK = flex._DEFAULT_SPARSE_BLOCK_SIZE
# For few queries torch would use a separate decoding kernel; one kernel for all sizes needs fewer compilations.
KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


def flash_attention(q_THD, k_RKD, v_RKD, cu_seqlens: tuple[int, ...]) -> torch.Tensor:
    """Attention over packed sequences without a past. The first one may have more keys than queries; the queries are then the last ones."""
    plan = _starts(cu_seqlens, k_RKD.shape[0] - q_THD.shape[0])
    starts = plan.query_starts.on(q_THD.device), plan.key_starts.on(q_THD.device)
    k, v = (x.to(q_THD.dtype) for x in (k_RKD, v_RKD))
    grouped = q_THD.shape[1] != k.shape[1]
    return varlen_attn(q_THD, k, v, *starts, plan.max_queries, plan.max_keys, window_size=(-1, 0), enable_gqa=grouped)


class _Starts(NamedTuple):
    query_starts: PlannedTensor
    key_starts: PlannedTensor
    max_queries: int
    max_keys: int


@cached_plan(maxsize=8)
def _starts(cu_seqlens: tuple[int, ...], seen: int) -> _Starts:
    keys = (0, *(end + seen for end in cu_seqlens[1:]))
    tables = (PlannedTensor(torch.tensor(starts, dtype=torch.int32)) for starts in (cu_seqlens, keys))
    return _Starts(*tables, *(max(b - a for a, b in zip(starts, starts[1:])) for starts in (cu_seqlens, keys)))


def interval_attention(q_THD: torch.Tensor, pools: tuple[torch.Tensor, ...], cu_seqlens: tuple[int, ...], bounds: Bounds) -> torch.Tensor:
    """Returns outputs `[T, H, D]`.

    Args:
        pools: keys and values, in turn, of every pool of `bounds`, then of the sequences' own tokens.
    """
    device = q_THD.device
    plan = _masks(cu_seqlens, bounds, tuple(x.shape[0] for x in pools[::2]))
    q = q_THD if plan.order is None else q_THD.index_select(0, plan.order.on(device))
    keys, values, outs, log_sums = pools[::2], pools[1::2], [], []
    for k, v, mask in zip(keys, values, plan.masks):
        if mask is not None:
            out, log_sum = _attend(q, k, v, mask)
            outs.append(out)
            log_sums.append(log_sum)
    out = outs[0]
    if len(outs) > 1:
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = torch.stack(log_sums).to(wide).softmax(0)
        out = sum(weight[..., None] * x.to(wide) for weight, x in zip(weights, outs)).to(q.dtype)
    # A pool of which nothing is read gets a gradient of zeros instead of none, because all ranks must reduce the same gradients.
    unread = [x[:0].sum() for pair in zip(keys, values, plan.masks) if pair[2] is None for x in pair[:2] if x.requires_grad]
    out = out + sum(unread) if unread else out
    return out if plan.order is None else out.index_select(0, plan.place.on(device))


def _attend(q, k, v, mask: "IntervalMask") -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[T, H, D]` and log-sums `[T, H]`; minus infinity for a query that sees nothing."""
    if wants_gpu_footprint():
        return flex_footprint(q, k, v)
    q, k, v = (x.to(q.dtype).transpose(0, 1)[None] for x in (q, k, v))
    out, aux = _flex_attention()(
        q,
        k,
        v,
        block_mask=mask.on(q.device),
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=KERNEL_OPTIONS,
        return_aux=flex.AuxRequest(lse=True),
    )
    return out[0].transpose(0, 1), aux.lse[0].T


@functools.cache
def _flex_attention() -> Callable:
    return torch.compile(flex.flex_attention, dynamic=True)


class IntervalMask:
    """The block mask, in the form that flex attention takes, of queries that each see one interval of a pool.

    Args:
        limits: first and end of each query's interval, `[T, 2]`.
        num_keys: number of keys in the pool, R.
    """

    def __init__(self, limits: np.ndarray, num_keys: int):
        self._limits, self._num_keys = PlannedTensor(torch.tensor(limits)), num_keys
        self._tables = [PlannedTensor(table) for blocks in _blocks(limits, num_keys) for table in _table(blocks)]
        self._masks: dict[torch.device, flex.BlockMask] = {}

    def on(self, device: torch.device) -> flex.BlockMask:
        """The mask on `device`."""
        if device not in self._masks:
            lower, upper = (x.contiguous() for x in self._limits.on(device).unbind(1))

            def sees(batch, head, query, key):
                return (key >= lower[query]) & (key < upper[query])

            lengths = len(lower), self._num_keys
            tables = (table.on(device) for table in self._tables)
            self._masks[device] = flex.BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)
        return self._masks[device]


def _blocks(limits: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks in which some queries see some keys, and blocks in which all queries see all keys, `[query blocks, key blocks]` each."""
    num_queries = len(limits)
    cuts = np.arange(0, num_queries, BLOCK)
    first_key = np.arange(0, num_keys, BLOCK)
    end_key = np.minimum(first_key + BLOCK, num_keys)
    # An empty interval is given a beginning behind all keys.
    lower, upper = np.where(limits[:, 0] < limits[:, 1], limits[:, 0], num_keys), limits[:, 1]
    lowest, highest = np.minimum.reduceat(lower, cuts)[:, None], np.maximum.reduceat(lower, cuts)[:, None]
    nearest, farthest = np.minimum.reduceat(upper, cuts)[:, None], np.maximum.reduceat(upper, cuts)[:, None]
    some = (lowest < end_key) & (farthest > first_key)
    whole_block = (np.minimum(cuts + BLOCK, num_queries) - cuts == BLOCK)[:, None] & (end_key - first_key == BLOCK)
    full = (highest <= first_key) & (nearest >= end_key) & whole_block
    return some & ~full, full


def _table(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block of queries, the number of its key blocks, and their indices, followed by those of the other key blocks."""
    counts = torch.from_numpy(blocks.sum(1, dtype=np.int32))
    indices = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))
    return counts[None, None], indices[None, None]


class _Masks(NamedTuple):
    """The masks of a call.

    Attributes:
        order: the order in which queries are taken; None for their own order.
        place: the index of each query in that order.
        masks: the mask of each pool; None if no query sees anything of it.
    """

    order: PlannedTensor | None
    place: PlannedTensor | None
    masks: tuple[IntervalMask | None, ...]


@cached_plan(maxsize=8)
def _masks(cu_seqlens: tuple[int, ...], bounds: Bounds, num_keys: tuple[int, ...]) -> _Masks:
    table = intervals(cu_seqlens, bounds)
    sequences = sorted_sequences(bounds, len(cu_seqlens) - 1)
    order = np.concatenate([np.arange(cu_seqlens[n], cu_seqlens[n + 1]) for n in sequences])
    masks = tuple(
        IntervalMask(limits[order], keys) if (limits[:, 1] > limits[:, 0]).any() else None for limits, keys in zip(table, num_keys)
    )
    if sequences == sorted(sequences):
        return _Masks(None, None, masks)
    return _Masks(PlannedTensor(torch.tensor(order)), PlannedTensor(torch.tensor(np.argsort(order))), masks)
