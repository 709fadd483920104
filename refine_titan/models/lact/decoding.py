"""LaCT's sequences while they take one token at a time.

A token needs the weights that its chunk reads, and a window of keys and values: both lie in buffers of their own, written in place. What
a token writes to the fast weights is computed when its chunk ends, not before. No sequence's result depends on the other sequences.
Legend: n sequences, W window, A attention heads, E channels of one, H fast heads, F channels of one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.gated_silu import gated_silu
from refine_kernels.lact import FastWeights, LaCTState, WritingTokens, reading_weights
from refine_kernels.packing import PlannedTensor, cached_plan
from refine_kernels.past_tokens import LastTokens, host_tensor
from refine_titan.models.decoding import Decoding, DecodingClock


class LaCTDecoding(Decoding):
    """What n sequences carry from token to token in one layer.

    Args:
        clock: counts the tokens read; all layers share it.
        advance: takes what tokens of one sequence write, `[tokens, H, ...]`, the initial weights and the sequence's state, and gives its
            state after these tokens.
        chunk_size: tokens of a chunk.
        prenorm: whether updates are added to weights that are not rescaled, as `refine_kernels.lact` says.
    """

    def __init__(
        self,
        clock: DecodingClock,
        advance: Callable[[WritingTokens, FastWeights, LaCTState], LaCTState],
        *,
        chunk_size: int,
        prenorm: bool,
    ):
        self._clock, self._advance = clock, advance
        self._chunk_size, self._prenorm = chunk_size, prenorm
        self._buffers: _Buffers | None = None

    def load(self, window: tuple[LastTokens, LastTokens], states: LaCTState, initial: FastWeights) -> None:
        """Copies the states of sequences into the buffers.

        Args:
            window: keys and values before each sequence's next token, W - 1 each.
            states: fast weights, and what the sequences' chunks have written.
            initial: the weights that every sequence starts with.
        """
        seen, pool = states.seen.tolist(), window[0].pool
        self._clock.start(seen, pool.device)
        self._rule = dict(chunk_size=self._chunk_size, compute_dtype=pool.dtype, prenorm=self._prenorm)
        weights = reading_weights(states, initial, **self._rule)
        if self._buffers is None:
            rings = (x.pool.new_empty(len(seen), x.count + 1, *x.pool.shape[1:]) for x in window)
            self._buffers = _Buffers(weights.map(torch.empty_like), *rings)
        # Copies, since they are written in place: without a cast the weights may be those of the pass.
        for buffer, weight in zip(self._buffers.weights, weights):
            buffer.copy_(weight)
        for ring, x in zip((self._buffers.keys, self._buffers.values), window):
            _fill(ring, x, seen)
        self._keeps_rows = not self.is_uniform()
        if self._keeps_rows:  # these states refer to all rows of the pass that gave them
            self._initial = initial
            self._states = [states.select(host_tensor([i])) for i in range(len(seen))]
            self._rows: list[WritingTokens] = []  # of all sequences, one entry a step
            self._kept_from = [0] * len(seen)  # first entry that is not in a sequence's state

    def is_uniform(self) -> bool:
        """Whether no sequence ends a chunk before its last token."""
        to_come = self._clock.tokens_to_come
        if to_come is None:
            return False
        return all(count % self._chunk_size + to_come <= self._chunk_size for count in self._clock.seen)

    def release(self) -> None:
        self._initial, self._states, self._rows = None, [], []

    def attend(self, q_nAE: torch.Tensor, k_nAE: torch.Tensor, v_nAE: torch.Tensor) -> torch.Tensor:
        """Takes each sequence's next key and value into its window, and attends to the window."""
        _, ring_keys, ring_values = self._buffers
        W = ring_keys.shape[1]
        slots_n, visible_nW = self._clock.derived(("ring", W), lambda seen_n: _slots_and_visible(seen_n, W))
        for ring, x in ((ring_keys, k_nAE), (ring_values, v_nAE)):
            ring.flatten(0, 1).index_copy_(0, slots_n, x)
        q, keys, values = (x.transpose(1, 2) for x in (q_nAE[:, None], ring_keys, ring_values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible_nW[:, None, None]).squeeze(2)

    def apply(self, q_nHF: torch.Tensor) -> torch.Tensor:
        """The outputs of the fast networks."""
        w0, w1, w2 = self._buffers.weights
        q = q_nHF.unsqueeze(2)
        return (gated_silu(q @ w0.mT, q @ w2.mT) @ w1.mT).squeeze(2)

    def write(self, rows: WritingTokens) -> None:
        """Takes what each sequence's token writes, `[n, H, ...]`, and updates the weights of the sequences whose chunk ends."""
        if not self._keeps_rows:
            return
        self._rows.append(rows)
        for i, count in enumerate(self._clock.seen):
            if (count + 1) % self._chunk_size == 0:
                own = zip(*(r.map(lambda x, i=i: x[i : i + 1]) for r in self._rows[self._kept_from[i] :]))
                joined = WritingTokens(*(None if same[0] is None else torch.cat(same) for same in own))
                self._states[i] = self._advance(joined, self._initial, self._states[i])
                self._kept_from[i] = len(self._rows)
                new = reading_weights(self._states[i], self._initial, **self._rule)
                for weight, updated in zip(self._buffers.weights, new):
                    weight[i] = updated[0]
        unused = min(self._kept_from)
        self._rows = self._rows[unused:]
        self._kept_from = [first - unused for first in self._kept_from]


class _Buffers(NamedTuple):
    """The weights that tokens read, and windows with room for one token more, `[n, W, ...]`: token t of a sequence lies in slot t mod
    W."""

    weights: FastWeights
    keys: torch.Tensor
    values: torch.Tensor


def _fill(ring: torch.Tensor, window: LastTokens, seen: list[int]) -> None:
    """Copies the windows into the slots of their tokens."""
    W = ring.shape[1]
    if W > 1:
        rows = _ring_rows(tuple(window.end.tolist()), tuple(seen), W).on(ring.device)
        torch.index_select(window.pool, 0, rows, out=ring.flatten(0, 1))


@cached_plan(maxsize=4)
def _ring_rows(ends: tuple[int, ...], seen: tuple[int, ...], W: int) -> PlannedTensor:
    """The rows of the pool that the slots take; any row where there is no token yet."""
    slot, count = torch.arange(W), host_tensor(seen)[:, None]
    back = (count - 1 - slot) % W + 1  # tokens from the sequence's end; W for the slot of the next token
    return PlannedTensor((host_tensor(ends)[:, None] - back).clamp_(0).flatten())


def _slots_and_visible(seen_n: torch.Tensor, W: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of the next tokens in the flattened rings, `[n]`, and which slots these tokens see, `[n, W]`."""
    slot = torch.arange(W, device=seen_n.device)
    first = torch.arange(seen_n.shape[0], device=seen_n.device) * W
    return first + seen_n % W, (slot <= seen_n[:, None]) | (seen_n[:, None] >= W)
