"""LaCT's sequences while they take one row at a time.

A row needs the weights that its chunk reads and a window of keys and values: both lie in buffers of their own, written in place,
and what a row writes to the fast weights is computed when its chunk ends, not before. Nothing that a sequence gets depends
on the others. Legend: n sequences, W window, A attention heads, E channels of one, H fast heads, F channels of one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from refine_kernels.gated_silu import gated_silu
from refine_kernels.lact import FastWeights, LaCTState, WritingRows, reading_weights
from refine_kernels.packing import PlannedTensor, cached_plan
from refine_kernels.rows import LastRows, host_tensor


class LaCTDecoding:
    """What n sequences carry from row to row.

    Args:
        window: keys and values before each sequence's next row, W - 1 each.
        states: where the sequences stand.
        initial: weights that every sequence starts with.
        advance: takes what rows of one sequence write, as `[rows, H, ...]`, the initial weights and the sequence's state, and gives
            its state after them.
        chunk_size, prenorm: of the fast weights.
    """

    def __init__(
        self,
        window: tuple[LastRows, LastRows],
        states: LaCTState,
        initial: FastWeights,
        advance: Callable[[WritingRows, FastWeights, LaCTState], LaCTState],
        *,
        chunk_size: int,
        prenorm: bool,
    ):
        self.seen: list[int] = states.seen.tolist()
        dtype = window[0].pool.dtype
        self._rule = dict(chunk_size=chunk_size, compute_dtype=dtype, prenorm=prenorm)
        self._initial, self._advance = initial, advance
        # Copies, since they are written: without a cast they may be the pass's own.
        self._weights = reading_weights(states, initial, **self._rule).map(torch.clone)
        self._keys, self._values = (_ring(x, self.seen) for x in window)
        self._states = [states.select(host_tensor([i])) for i in range(len(self.seen))]
        self._rows: list[WritingRows] = []  # of all sequences, one entry a step
        self._kept_from = [0] * len(self.seen)  # first entry that is not in a sequence's state

    def attend(self, q_nAE: torch.Tensor, k_nAE: torch.Tensor, v_nAE: torch.Tensor) -> torch.Tensor:
        """Takes the next row's key and value into each window, and attends to it."""
        plan = _ring_plan(tuple(self.seen), self._keys.shape[1])
        slots = plan[0].on(q_nAE.device)
        for ring, x in ((self._keys, k_nAE), (self._values, v_nAE)):
            ring.flatten(0, 1).index_copy_(0, slots, x)
        q, keys, values = (x.transpose(1, 2) for x in (q_nAE[:, None], self._keys, self._values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=plan[1].on(q.device)).squeeze(2)

    def apply(self, q_nHF: torch.Tensor) -> torch.Tensor:
        """The fast networks' outputs."""
        w0, w1, w2 = self._weights
        q = q_nHF.unsqueeze(2)
        return (gated_silu(q @ w0.mT, q @ w2.mT) @ w1.mT).squeeze(2)

    def write(self, rows: WritingRows) -> None:
        """Takes what each sequence's row writes, `[n, H, ...]`; new weights where a chunk ends."""
        self._rows.append(rows)
        self.seen = [count + 1 for count in self.seen]
        for i, count in enumerate(self.seen):
            if count % self._rule["chunk_size"] == 0:
                own = zip(*(r.map(lambda x: x[i : i + 1]) for r in self._rows[self._kept_from[i] :]))
                joined = WritingRows(*(None if same[0] is None else torch.cat(same) for same in own))
                self._states[i] = self._advance(joined, self._initial, self._states[i])
                self._kept_from[i] = len(self._rows)
                new = reading_weights(self._states[i], self._initial, **self._rule)
                for weight, row in zip(self._weights, new):
                    weight[i] = row[0]
        unused = min(self._kept_from)
        self._rows = self._rows[unused:]
        self._kept_from = [first - unused for first in self._kept_from]


def _ring(window: LastRows, seen: list[int]) -> torch.Tensor:
    """Windows with room for one row more, `[n, W, ...]`: row t of a sequence lies in slot t mod W."""
    W = window.count + 1
    if W == 1:
        return window.pool.new_empty(len(seen), 1, *window.pool.shape[1:])
    rows = _ring_rows(tuple(window.end.tolist()), tuple(seen), W).on(window.pool.device)
    return window.pool.index_select(0, rows).unflatten(0, (len(seen), W))


@cached_plan(maxsize=4)
def _ring_rows(ends: tuple[int, ...], seen: tuple[int, ...], W: int) -> PlannedTensor:
    """Rows of the pool that the slots take; any for rows that do not exist yet."""
    slot, count = torch.arange(W), host_tensor(seen)[:, None]
    back = (count - 1 - slot) % W + 1  # rows from the sequence's end; W for the next one's slot
    return PlannedTensor((host_tensor(ends)[:, None] - back).clamp_(0).flatten())


@cached_plan(maxsize=4)
def _ring_plan(seen: tuple[int, ...], W: int) -> tuple[PlannedTensor, PlannedTensor]:
    """Slots of the next rows in the flattened rings `[n]`, and which slots they see, `[n, 1, 1, W]`."""
    count = host_tensor(seen)
    slots = torch.arange(len(seen)) * W + count % W
    visible = (torch.arange(W) <= count[:, None]) | (count[:, None] >= W)
    return PlannedTensor(slots), PlannedTensor(visible[:, None, None])
