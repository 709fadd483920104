"""Trust between engine and trainer: their log-probabilities of the same tokens. Legend: n rollouts, k tokens."""

import torch

from refine_titan.rollout.engine import EngineError, RolloutRequest, Rollouts

# Rollouts named in an error.
SHOWN = 3


def refuse_gap(limit: float, request: RolloutRequest, rollouts: Rollouts, trainer_logprobs_nk: torch.Tensor) -> None:
    """Refuses rollouts that the trainer would have sampled with other probabilities.

    Args:
        limit: largest difference of a token's log-probabilities, in nats.

    Raises:
        EngineError: naming the weights' version and the worst rollouts.
    """
    gap_nk = (rollouts.logprobs_nk - trainer_logprobs_nk).abs()
    # A NaN on either side is above every limit.
    worst_n = gap_nk.nan_to_num(nan=torch.inf).amax(1)
    refused = (worst_n > limit).nonzero()[:, 0].tolist()
    if not refused:
        return
    refused.sort(key=lambda i: -float(worst_n[i]))
    lines = []
    for i in refused[:SHOWN]:
        j = int(gap_nk[i].nan_to_num(nan=torch.inf).argmax())
        lines.append(
            f"rollout {i} at position {request.starts[i]}, token {j} (id {int(rollouts.tokens_nk[i, j])}): "
            f"{rollouts.engine} {float(rollouts.logprobs_nk[i, j]):.4f}, trainer {float(trainer_logprobs_nk[i, j]):.4f}"
        )
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    raise EngineError(
        f"{len(refused)} of {len(worst_n)} rollouts of weights version {rollouts.weight_version} have log-probabilities further "
        f"from the trainer's than rollout.max_logprob_gap = {limit}: {'; '.join(lines)}{more}"
    )


def importance_weights(trainer_logprobs_nk: torch.Tensor, engine_logprobs_nk: torch.Tensor, cap: float) -> torch.Tensor | None:
    """Truncated importance ratios p_trainer / p_engine of sampled tokens, at most `cap`; None for no correction (cap 0).

    Their expectation under the engine's sampling makes up for its arithmetic; the cap bounds their variance
    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    if cap == 0:
        return None
    return (trainer_logprobs_nk - engine_logprobs_nk).exp().clamp(max=cap)
