"""Samples rollouts that the trainer can trust: the engine has the trainer's weights, the trainer's own model rescores what it samples, and
rollouts on which the two disagree are refused.

Legend: n rollouts, k tokens, D hidden channels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.continuation import rescore_rollouts
from refine_titan.rollout.engine import PrefixStates, RolloutEngine, RolloutRequest, Rollouts
from refine_titan.rollout.logprob_gate import importance_weights, refuse_gap
from refine_titan.steps.runtime import StepRuntime


@dataclass(frozen=True)
class CheckedRollouts:
    """Rollouts, with logits, hidden states and log-probabilities by the trainer's own model.

    Attributes:
        sampled: the engine's rollouts.
        logits_nkV: logits of the distribution from which each token was drawn; with gradient if it is enabled.
        hidden_nkD: hidden state after the final norm at each token; with gradient if it is enabled.
        logprobs_nk: log-probabilities of the tokens at the sampling temperature; detached.
        weights_nk: factors of the tokens' losses that correct for the engine's arithmetic; None for no correction.
    """

    sampled: Rollouts
    logits_nkV: torch.Tensor
    hidden_nkD: torch.Tensor
    logprobs_nk: torch.Tensor
    weights_nk: torch.Tensor | None

    @property
    def tokens_nk(self) -> torch.Tensor:
        return self.sampled.tokens_nk


def sample_together(
    engine: RolloutEngine,
    metrics: StepMetrics,
    requests: Sequence[RolloutRequest],
    prefixes: Sequence[PrefixStates],
    *,
    engine_sleeps: bool,
    stage: str = "rollout",
) -> list[Rollouts]:
    """Gives the engine the trainer's weights if it has others, lets it sample the rollouts of several microbatches in one round and then
    sleep.

    Args:
        requests: one for each microbatch, with the same length, temperature and weights.
        prefixes: the states after each microbatch's prefixes.
        engine_sleeps: whether the engine gives its memory to a backward that follows.
        stage: stage to which the time is added.

    Returns:
        The rollouts of each microbatch.

    Raises:
        EngineError: if the engine fails.
    """
    request = RolloutRequest.together(requests)
    if engine.weight_version != request.weight_version:
        with metrics.stage("sync"):
            engine.sync_weights(request.weight_version)
    with metrics.stage(stage):
        sampled = engine.generate(request, PrefixStates.together(prefixes))
        if engine_sleeps:
            engine.sleep()
        return sampled.split([len(request.starts) for request in requests])


def check_rollouts(
    runtime: StepRuntime, metrics: StepMetrics, request: RolloutRequest, prefix: PrefixStates, sampled: Rollouts, stage: str = "rescore"
) -> CheckedRollouts:
    """Runs the trainer's own model over one microbatch's rollouts, and compares its log-probabilities with the engine's.

    Raises:
        EngineError: if they disagree more than rounding explains (`rollout.max_logprob_gap`).
    """
    settings = runtime.config.rollout
    with metrics.stage(stage):
        rescored = rescore_rollouts(runtime.forward, prefix, sampled.tokens_nk)
        logprobs_nk = chosen_logprobs(rescored.logits_nkV.detach(), sampled.tokens_nk, request.temperature)
        refuse_gap(settings.max_logprob_gap, request, sampled, logprobs_nk, runtime.gap_window)
        weights_nk = importance_weights(logprobs_nk, sampled.logprobs_nk, settings.importance_ratio_cap)
    return CheckedRollouts(sampled, rescored.logits_nkV, rescored.hidden_nkD, logprobs_nk, weights_nk)
