"""Samples rollouts that the trainer can trust: the engine has the trainer's weights, the trainer's own model rescores what it samples, and
rollouts on which the two disagree are refused.

Legend: n rollouts, k tokens, D hidden channels, V vocabulary.
"""

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


def roll_out_checked(
    runtime: StepRuntime,
    engine: RolloutEngine,
    metrics: StepMetrics,
    request: RolloutRequest,
    prefix: PrefixStates,
    *,
    engine_sleeps: bool = True,
    stages: tuple[str, str] = ("rollout", "rescore"),
) -> CheckedRollouts:
    """Gives the engine the trainer's weights if it has others, lets it sample and then sleep, runs the trainer's own model over the
    rollouts, and compares the log-probabilities.

    Args:
        engine_sleeps: whether the engine gives its memory to a backward that follows.
        stages: stages to which the time of sampling and of rescoring is added.

    Raises:
        EngineError: if the engine fails or disagrees with the trainer more than rounding explains (`rollout.max_logprob_gap`).
    """
    settings = runtime.config.rollout
    if engine.weight_version != request.weight_version:
        with metrics.stage("sync"):
            engine.sync_weights(request.weight_version)
    sampling, rescoring = stages
    with metrics.stage(sampling):
        sampled = engine.generate(request, prefix)
        if engine_sleeps:
            engine.sleep()
    with metrics.stage(rescoring):
        rescored = rescore_rollouts(runtime.forward, prefix, sampled.tokens_nk)
        logprobs_nk = chosen_logprobs(rescored.logits_nkV.detach(), sampled.tokens_nk, request.temperature)
        refuse_gap(settings.max_logprob_gap, request, sampled, logprobs_nk, runtime.gap_window)
        weights_nk = importance_weights(logprobs_nk, sampled.logprobs_nk, settings.importance_ratio_cap)
    return CheckedRollouts(sampled, rescored.logits_nkV, rescored.hidden_nkD, logprobs_nk, weights_nk)
