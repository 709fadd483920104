"""What a ReFINE step knows of a microbatch, from the choice of its rollouts to its loss.

Legend: n rollouts of this rank, N rollouts of all ranks that share the microbatch, k tokens of a rollout, D hidden channels, V vocabulary.
"""

from dataclasses import dataclass

import torch

from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard
from refine_titan.rollout.engine import PrefixStates, RolloutRequest


@dataclass(frozen=True)
class Selection:
    """Positions and seeds of the rollouts of one microbatch. The i-th start and seed belong to the i-th of its N rollouts.

    Attributes:
        starts: position of each rollout in the microbatch's stream.
        seeds: seed of each rollout's draws.
        own: indices of the n rollouts that leave this rank's tokens.
    """

    starts: tuple[int, ...]
    seeds: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def own_starts(self) -> tuple[int, ...]:
        return tuple(self.starts[i] for i in self.own)

    @property
    def own_seeds(self) -> tuple[int, ...]:
        return tuple(self.seeds[i] for i in self.own)


@dataclass
class ScoredMicrobatch:
    """A microbatch that the trainer has read, and whose rollouts are still to be sampled.

    Attributes:
        shard: this rank's part of it.
        nll_sum: the next-token loss if the pass has one.
        selection: where rollouts start.
        true_tokens_nk: tokens that follow the prefixes of this rank's rollouts; none on a rank without rollouts.
        true_hidden_nkD: hidden states of these tokens; detached.
        request: asks the engine for this rank's rollouts.
        prefix: the states from which they go on, with gradient if it is enabled.
    """

    batch: TokenBatch
    shard: ContextShard
    nll_sum: torch.Tensor | None
    selection: Selection
    true_tokens_nk: torch.Tensor
    true_hidden_nkD: torch.Tensor
    request: RolloutRequest
    prefix: PrefixStates


@dataclass
class Experience:
    """This rank's rollouts of one microbatch and what the update needs of them; all detached.

    Attributes:
        starts: position of each rollout in the microbatch's stream.
        tokens_nk: rollout tokens.
        old_logprobs_nk: log-probabilities by the weights that made the rollouts, recomputed by the trainer.
        advantages_n: one advantage per rollout; None on a rank without rollouts, whose stand-in trains nothing.
        weights_nk: factors of the tokens' losses that correct for the engine's arithmetic; None for no correction.
    """

    starts: tuple[int, ...]
    tokens_nk: torch.Tensor
    old_logprobs_nk: torch.Tensor
    advantages_n: torch.Tensor | None
    weights_nk: torch.Tensor | None


@dataclass
class TrainingPass:
    """A microbatch's forward with gradient, from which the loss is computed.

    Attributes:
        nll_sum: the next-token loss, summed over this rank's tokens.
        logits_nkV: logits of the rollouts' tokens; None without rollouts.
        experience: the rollouts; None without any.
    """

    nll_sum: torch.Tensor
    logits_nkV: torch.Tensor | None
    experience: Experience | None


@dataclass
class Normalizers:
    """Numbers of tokens of a mini-batch over all ranks: trunk tokens with a label, and rollout tokens."""

    labels: float | torch.Tensor
    rollout_tokens: int
