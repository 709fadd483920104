"""A layer of attention whose sequences take one token at a time. Legend: n sequences, K key heads, D channels of a head."""

import torch

from refine_kernels.attention import attention_step
from refine_kernels.past_tokens import TokenSpans
from refine_titan.models.decoding import Decoding, DecodingClock

# Tokens that a buffer has room for at first where nobody says how many will come.
FIRST_TOKENS = 64


class AttentionDecoding(Decoding):
    """What n sequences carry: references to the keys and values of their past, and buffers for those of the tokens since.

    Args:
        clock: of all layers.
    """

    def __init__(self, clock: DecodingClock):
        self._clock = clock
        self._buffers: list[torch.Tensor] = []  # [tokens, n, K, D] each
        self._count = 0

    def load(self, keys: TokenSpans, values: TokenSpans) -> None:
        """Takes up where sequences stand."""
        self._past = keys, values
        self._count = 0
        self._clock.start(keys.lengths, keys.pools[0].device)

    def attend(self, q_nHD: torch.Tensor, k_nKD: torch.Tensor, v_nKD: torch.Tensor) -> torch.Tensor:
        """Takes the next token's key and value, and attends to all of the sequence."""
        if not self._buffers or self._count == self._buffers[0].shape[0]:
            room = max(self._clock.tokens_to_come or 0, 2 * self._count, FIRST_TOKENS if self._clock.tokens_to_come is None else 1)
            grown = [x.new_empty(room, *x.shape) for x in (k_nKD, v_nKD)]
            for new, old in zip(grown, self._buffers):
                new[: self._count] = old
            self._buffers = grown
        for buffer, x in zip(self._buffers, (k_nKD, v_nKD)):
            buffer[self._count] = x
        self._count += 1
        return attention_step(q_nHD, *self._past, *(buffer[: self._count] for buffer in self._buffers))

    def is_uniform(self) -> bool:
        """The pools of a past are others in every round."""
        return False

    def release(self) -> None:
        self._past = None
