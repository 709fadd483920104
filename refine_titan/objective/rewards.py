"""Rewards of rollouts against the true continuation (paper section 3.2).

Legend: n rollouts, k tokens of a rollout, D hidden channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class RewardInputs:
    """What a reward is given: rollouts and, token by token, the true continuation of the same prefixes. Nothing of it may be changed.

    All tensors lie on the same device. Ranks without rollouts call no reward, so that n is at least 1.

    Attributes:
        tokens_nk: rollout tokens y_j, int64.
        true_tokens_nk: true tokens x_{r+j}, int64.
        hidden_nkD: hidden states of the final norm at the rollout tokens, h(y_j), in the precision of the model's output.
        true_hidden_nkD: those of the scoring pass at the true tokens, h(x_{r+j}).
        logprobs_nk: log-probabilities of the rollout tokens by the trainer, at `refine.temperature`, float32.
        decode: text of a list of tokens.
    """

    tokens_nk: torch.Tensor
    true_tokens_nk: torch.Tensor
    hidden_nkD: torch.Tensor
    true_hidden_nkD: torch.Tensor
    logprobs_nk: torch.Tensor
    decode: Callable[[list[int]], str]

    def texts(self) -> tuple[str, ...]:
        """Text of each rollout. Decoded at the first call."""
        return self._texts

    def true_texts(self) -> tuple[str, ...]:
        """Text of each true continuation. Decoded at the first call."""
        return self._true_texts

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return tuple(self.decode(tokens) for tokens in self.tokens_nk.tolist())

    @cached_property
    def _true_texts(self) -> tuple[str, ...]:
        return tuple(self.decode(tokens) for tokens in self.true_tokens_nk.tolist())


# One number a rollout, `[n]`, float32, on the device of the inputs.
Reward = Callable[[RewardInputs], torch.Tensor]


def cosine(inputs: RewardInputs) -> torch.Tensor:
    """Mean over tokens of cos(h(y_j), h(x_{r+j})), the similarity of the hidden states."""
    return F.cosine_similarity(inputs.hidden_nkD.float(), inputs.true_hidden_nkD.float(), dim=-1).mean(-1)


def binary(inputs: RewardInputs) -> torch.Tensor:
    """Mean over tokens of 1[y_j = x_{r+j}], the share of tokens that equal the true ones."""
    return (inputs.tokens_nk == inputs.true_tokens_nk).float().mean(-1)


def hybrid(inputs: RewardInputs) -> torch.Tensor:
    """Sum of `cosine` and `binary`."""
    return cosine(inputs) + binary(inputs)


# The built-in values of `refine.reward`; `extensions.py` finds those of installed packages.
REWARDS: dict[str, Reward] = {"cosine": cosine, "binary": binary, "hybrid": hybrid}
