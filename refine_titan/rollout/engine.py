"""What a rollout engine is given and what it returns. Legend: n rollouts, k tokens."""

from dataclasses import dataclass
from typing import Protocol

import torch

from refine_titan.models.shared_prefix import LayerState


@dataclass(frozen=True)
class RolloutRequest:
    """Rollouts wanted from one microbatch. The i-th of each field belongs to the i-th rollout.

    Attributes:
        tokens_T: the microbatch's packed tokens.
        cu_seqlens: its documents.
        starts: position at which each rollout begins; the prefix is its document up to there.
        uniforms_nk: one number in [0, 1) per token to be sampled, float64, from the run's seed.
        length: tokens of each rollout, k.
        temperature: sampling temperature; 0 is greedy.
    """

    tokens_T: torch.Tensor
    cu_seqlens: tuple[int, ...]
    starts: tuple[int, ...]
    uniforms_nk: torch.Tensor
    length: int
    temperature: float


@dataclass(frozen=True)
class PrefixStates:
    """Where rollouts continue from: every prefix without its last token, and that token.

    Attributes:
        last_tokens_n: the last token of each prefix.
        layers: per layer the states after all tokens before it.
    """

    last_tokens_n: torch.Tensor
    layers: list[LayerState]


@dataclass(frozen=True)
class Rollouts:
    """What an engine sampled.

    Attributes:
        tokens_nk: sampled tokens, exactly k each.
        logprobs_nk: the engine's own log-probabilities of them, float32.
        engine: name of the engine.
        weight_version: version of the weights it sampled with.
    """

    tokens_nk: torch.Tensor
    logprobs_nk: torch.Tensor
    engine: str
    weight_version: int


class RolloutEngine(Protocol):
    """Samples rollouts with the trainer's current weights."""

    name: str

    def generate(self, request: RolloutRequest, prefix: PrefixStates) -> Rollouts:
        """Samples `request.length` tokens after each prefix. `prefix` may be ignored by an engine that has its own
        state cache."""

    def sync_weights(self, version: int) -> None:
        """Takes over the trainer's weights, which have reached `version` (optimizer steps so far)."""
