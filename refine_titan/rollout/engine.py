"""The interface of rollout engines: requests, states of prefixes, rollouts, errors. Legend: n rollouts, k tokens."""

from dataclasses import dataclass
from typing import Protocol

import torch

from refine_titan.models.shared_prefix import LayerState


@dataclass(frozen=True)
class RolloutRequest:
    """A request for rollouts of one microbatch. The i-th start and the i-th seed belong to the i-th rollout.

    Attributes:
        tokens_T: the microbatch's packed tokens.
        cu_seqlens: positions at which its documents begin and end.
        starts: position at which each rollout begins; its prefix is the document up to there.
        seeds: seed of each rollout's draws, 63 bits, derived from the run's seed.
        length: tokens of each rollout, k.
        temperature: sampling temperature; 0 is greedy.
        weight_version: version of the weights to sample with, in optimizer steps.
    """

    tokens_T: torch.Tensor
    cu_seqlens: tuple[int, ...]
    starts: tuple[int, ...]
    seeds: tuple[int, ...]
    length: int
    temperature: float
    weight_version: int


@dataclass(frozen=True)
class PrefixStates:
    """The states from which rollouts continue, each after a prefix without its last token; and these last tokens.

    Attributes:
        last_tokens_n: the last token of each prefix.
        layers: per layer the states after all tokens before the last one.
    """

    last_tokens_n: torch.Tensor
    layers: list[LayerState]


@dataclass(frozen=True)
class Rollouts:
    """Rollouts that an engine sampled.

    Attributes:
        tokens_nk: sampled tokens, exactly k each.
        logprobs_nk: the engine's own log-probabilities of them, float32.
        engine: name of the engine.
        weight_version: version of the weights with which they were sampled.
        prefilled_tokens: tokens of prefixes that the engine read; 0 if it continues from the trainer's states.
    """

    tokens_nk: torch.Tensor
    logprobs_nk: torch.Tensor
    engine: str
    weight_version: int
    prefilled_tokens: int = 0


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or what it did cannot be trusted."""


class RolloutEngine(Protocol):
    """Samples rollouts with the trainer's current weights."""

    name: str
    takes_states: bool
    """Whether `generate` starts from the states in `prefix` rather than from tokens."""

    @property
    def weight_version(self) -> int | None:
        """Version of the weights that the engine holds, in optimizer steps; None if it cannot sample before a sync."""

    def sync_weights(self, version: int) -> None:
        """Takes over the trainer's weights, whose version is `version`. With a sharded trainer every rank must call this.

        Raises:
            EngineError: if the engine then does not hold these weights.
        """

    def generate(self, request: RolloutRequest, prefix: PrefixStates | None) -> Rollouts:
        """Samples `request.length` tokens after each prefix. `prefix` may be None unless the engine `takes_states`.

        Raises:
            EngineError: if it holds weights of another version, or fails.
        """

    def sleep(self) -> None:
        """Gives device memory back to the trainer until it is needed again. Copies of weights are lost with it."""

    def close(self) -> None:
        """Releases what the engine holds."""
