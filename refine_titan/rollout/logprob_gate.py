"""Trust between engine and trainer: their log-probabilities of the same tokens. Legend: n rollouts, k tokens."""

from collections import deque

import torch
from torchtitan.tools.logging import logger

from refine_titan.rollout.engine import EngineError, RolloutRequest, Rollouts

# Rollouts named in an error.
SHOWN = 3
# A token's log-probabilities can differ by more than the limit through rounding alone: one of many thousands, where both think it
# unlikely. Among so many tokens more than so many cannot be rounding.
WINDOW_TOKENS, MOST_OUTLIERS = 1024, 10
# Nor can half of a round's tokens, if they are at least so many.
LEAST_WRONG_TOKENS = 3


class GapWindow:
    """The last rounds of an engine, as many as make `WINDOW_TOKENS` tokens: how many tokens they had, and how many above the limit."""

    def __init__(self):
        self._rounds: deque[tuple[int, int]] = deque()

    def add(self, num_tokens: int, num_above: int) -> int:
        """Takes a round in; returns the tokens above the limit in the window."""
        self._rounds.append((num_tokens, num_above))
        while sum(tokens for tokens, _ in self._rounds) - self._rounds[0][0] >= WINDOW_TOKENS:
            self._rounds.popleft()
        return sum(above for _, above in self._rounds)


def refuse_gap(
    limit: float,
    request: RolloutRequest,
    rollouts: Rollouts,
    trainer_logprobs_nk: torch.Tensor,
    window: GapWindow | None = None,
) -> None:
    """Refuses rollouts that the trainer would have sampled with other probabilities, as far as that cannot be rounding: a value that is
    not finite, half of the round's tokens above `limit`, or more than `MOST_OUTLIERS` in the window.

    Args:
        limit: difference of a token's log-probabilities by engine and trainer, in nats, that rounding stays below but for single tokens.
        window: the engine's last rounds, which this one joins; None for this one alone.

    Raises:
        EngineError: naming the weights' version and the worst rollouts.
    """
    # A NaN on either side is above every limit.
    gap_nk = (rollouts.logprobs_nk - trainer_logprobs_nk).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    num_above, num_infinite = torch.stack([(gap_nk > limit).sum(), gap_nk.isinf().sum()]).tolist()
    num_in_window = num_above if window is None else window.add(gap_nk.numel(), num_above)
    if num_above == 0:
        return
    is_wrong = num_above >= max(LEAST_WRONG_TOKENS, gap_nk.numel() / 2)
    if num_infinite or is_wrong or num_in_window > MOST_OUTLIERS:
        raise EngineError(_describe(limit, request, rollouts, trainer_logprobs_nk, gap_nk, num_in_window))
    logger.warning(
        f"{num_above} of {gap_nk.numel()} rollout tokens of weights version {rollouts.weight_version} have log-probabilities further from "
        f"the trainer's than rollout.max_logprob_gap = {limit}, at most {float(gap_nk.max()):.3g}; among {WINDOW_TOKENS} tokens "
        f"{MOST_OUTLIERS} can be rounding"
    )


def _describe(limit, request, rollouts, trainer_logprobs_nk, gap_nk, num_in_window: int) -> str:
    worst_n = gap_nk.amax(1)
    refused = (worst_n > limit).nonzero()[:, 0].tolist()
    refused.sort(key=lambda i: -float(worst_n[i]))
    lines = []
    for i in refused[:SHOWN]:
        j = int(gap_nk[i].argmax())
        lines.append(
            f"rollout {i} at position {request.starts[i]}, token {j} (id {int(rollouts.tokens_nk[i, j])}): "
            f"{rollouts.engine} {float(rollouts.logprobs_nk[i, j]):.4f}, trainer {float(trainer_logprobs_nk[i, j]):.4f}"
        )
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    return (
        f"{len(refused)} of {len(worst_n)} rollouts of weights version {rollouts.weight_version} have log-probabilities further "
        f"from the trainer's than rollout.max_logprob_gap = {limit}, which cannot be rounding ({num_in_window} tokens of the last rounds): "
        f"{'; '.join(lines)}{more}"
    )


def importance_weights(trainer_logprobs_nk: torch.Tensor, engine_logprobs_nk: torch.Tensor, cap: float) -> torch.Tensor | None:
    """Truncated importance ratios p_trainer / p_engine of sampled tokens, at most `cap`; None for no correction (cap 0).

    Their expectation under the engine's sampling makes up for its arithmetic; the cap bounds their variance
    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    if cap == 0:
        return None
    return (trainer_logprobs_nk - engine_logprobs_nk).exp().clamp(max=cap)
