"""The interface of rollout engines: requests, states of prefixes, rollouts, errors. Legend: n rollouts, k tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, Self

import torch

from refine_titan.errors import RunFailure
from refine_titan.models.shared_prefix import LayerState


@dataclass(frozen=True)
class RolloutRequest:
    """A request for rollouts of packed documents. The i-th start and the i-th seed belong to the i-th rollout.

    Attributes:
        tokens_T: packed tokens, those of one microbatch or of several.
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

    @classmethod
    def together(cls, requests: Sequence[Self]) -> Self:
        """Joins requests that differ only in their documents and rollouts."""
        if len(requests) == 1:
            return requests[0]
        offsets = [0, *accumulate(len(request.tokens_T) for request in requests)]
        placed = list(zip(requests, offsets))
        return replace(
            requests[0],
            tokens_T=torch.cat([request.tokens_T for request in requests]),
            cu_seqlens=(0, *(offset + end for request, offset in placed for end in request.cu_seqlens[1:])),
            starts=tuple(offset + start for request, offset in placed for start in request.starts),
            seeds=tuple(seed for request in requests for seed in request.seeds),
        )


@dataclass(frozen=True)
class PrefixStates:
    """The states from which rollouts continue, each after a prefix without its last token; and these last tokens.

    Attributes:
        last_tokens_n: the last token of each prefix.
        layers: per layer the states after all tokens before the last one.
    """

    last_tokens_n: torch.Tensor
    layers: list[LayerState]

    @classmethod
    def together(cls, prefixes: Sequence[Self]) -> Self:
        """Joins the prefixes of several microbatches, detached."""
        layers = [LayerState.cat([layer.detach() for layer in layers]) for layers in zip(*(prefix.layers for prefix in prefixes))]
        return cls(torch.cat([prefix.last_tokens_n for prefix in prefixes]), layers)


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

    def split(self, counts: Sequence[int]) -> "list[Rollouts]":
        """Parts with so many rollouts each. The tokens that the engine read are counted by the first part."""
        tokens, logprobs = self.tokens_nk.split(list(counts)), self.logprobs_nk.split(list(counts))
        parts = [replace(self, tokens_nk=t, logprobs_nk=p, prefilled_tokens=0) for t, p in zip(tokens, logprobs)]
        return [replace(parts[0], prefilled_tokens=self.prefilled_tokens), *parts[1:]]


class EngineError(RunFailure):
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
