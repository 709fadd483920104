"""Policy loss and its optional terms. Legend: n rollouts, k tokens, V vocabulary."""

from typing import NamedTuple

import torch

# Log-ratios beyond this would overflow the ratio.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """Sums over the rollout tokens: `loss` is differentiable, the others are detached.

    `clipped`: tokens whose ratio was cut by the upper or lower clip; `clipped_dual`: tokens with negative advantage
    cut by the dual clip; `kl`: sum of `old - new` log-probs, an estimate of KL(old || new).
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    clipped_dual: torch.Tensor
    kl: torch.Tensor


def policy_loss(
    logprobs_nk: torch.Tensor,
    old_logprobs_nk: torch.Tensor,
    advantages_nk: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """Dual-clip PPO (arXiv 1912.09729), summed over tokens.

    Args:
        advantages_nk: advantage of each token, broadcastable to `[n, k]`.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_dual: for negative advantages the loss is at most `-advantage * clip_dual`.
        weights: factor of each token's loss, `[n, k]`, not differentiated; None for 1.
    """
    advantages_nk = advantages_nk.expand_as(logprobs_nk)
    log_ratio = (logprobs_nk - old_logprobs_nk).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages_nk * ratio
    bounded = -advantages_nk * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(plain, bounded)
    ceiling = -advantages_nk * clip_dual
    negative = advantages_nk < 0
    loss = torch.where(negative, torch.minimum(pessimistic, ceiling), pessimistic)
    if weights is not None:
        loss = loss * weights
    clipped = (bounded > plain).sum()
    clipped_dual = ((ceiling < pessimistic) & negative).sum()
    return PolicyLoss(loss.sum(), clipped, clipped_dual, -log_ratio.detach().sum())


def kl_penalty(logprobs_nk: torch.Tensor, old_logprobs_nk: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the low-variance, non-negative estimate of KL(new || old) (Schulman's k3)."""
    log_ratio = (old_logprobs_nk - logprobs_nk).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1).sum()


def token_entropy(logits_nkV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of the policy at each token, differentiable, `[n, k]`."""
    log_probs = _log_policy(logits_nkV, temperature)
    return -(log_probs.exp() * log_probs).sum(-1)


def chosen_logprobs(logits_nkV: torch.Tensor, tokens_nk: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token under the policy, `[n, k]`."""
    return _log_policy(logits_nkV, temperature).gather(-1, tokens_nk[..., None])[..., 0]


def _log_policy(logits_nkV: torch.Tensor, temperature: float) -> torch.Tensor:
    """The policy is `softmax(logits / temperature)`; temperature 0 (greedy sampling) counts as 1."""
    return (logits_nkV / temperature if temperature > 0 else logits_nkV).log_softmax(-1)
