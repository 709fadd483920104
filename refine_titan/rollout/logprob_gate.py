"""The gate: compares the log-probabilities that engine and trainer give to the same tokens. Legend: n rollouts, k tokens."""

from collections import deque

import torch
from torchtitan.tools.logging import logger

from refine_kernels.packing import on_host
from refine_titan.rollout.engine import EngineError, RolloutRequest, Rollouts

# Rollouts named in an error.
SHOWN = 3
# Through rounding alone, the log-probabilities of an unlikely token can differ by more than the limit: of one token in many thousands. More
# than MOST_OUTLIERS in the last rounds, which have WINDOW_TOKENS tokens together or are one longer round, is refused.
WINDOW_TOKENS, MOST_OUTLIERS = 1024, 10
# Neither can half of a round's tokens, if these are at least so many.
LEAST_WRONG_TOKENS = 3


class GapWindow:
    """Counts the tokens of an engine's last rounds, up to `WINDOW_TOKENS`, and those of them above the limit."""

    def __init__(self):
        self._rounds: deque[tuple[int, int]] = deque()

    def add(self, num_tokens: int, num_above: int) -> int:
        """Adds a round; returns the number of tokens above the limit in the window."""
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
    """Refuses rollouts whose log-probabilities by engine and trainer differ by more than rounding: if one is not finite, half of the
    round's tokens are above `limit`, or more than `MOST_OUTLIERS` tokens in the window are.

    Args:
        limit: largest difference, in nats, that rounding explains, except in single tokens.
        window: the engine's last rounds, to which this one is added; None to judge this round alone.

    Raises:
        EngineError: naming the weights' version and the worst rollouts.
    """
    # A NaN on either side is above every limit.
    gap_nk = (rollouts.logprobs_nk - trainer_logprobs_nk).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    (counts,) = on_host(torch.stack([(gap_nk > limit).sum(), gap_nk.isinf().sum()]))
    num_above, num_infinite = counts.tolist()
    num_in_window = num_above if window is None else window.add(gap_nk.numel(), num_above)
    if num_above == 0:
        return
    is_wrong = num_above >= max(LEAST_WRONG_TOKENS, gap_nk.numel() / 2)
    if num_infinite or is_wrong or num_in_window > MOST_OUTLIERS:
        raise EngineError(_describe(limit, request, rollouts, trainer_logprobs_nk, gap_nk, num_in_window))
    logger.warning(
        f"{num_above} of {gap_nk.numel()} rollout tokens of weights version {rollouts.weight_version} have log-probabilities further from "
        f"the trainer's than rollout.max_logprob_gap = {limit}, at most {float(gap_nk.max()):.3g}; in rounds of {WINDOW_TOKENS} tokens "
        f"together {MOST_OUTLIERS} can be rounding"
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
