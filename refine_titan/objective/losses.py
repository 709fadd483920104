"""The policy loss and its optional terms. Legend: n rollouts, k tokens of a rollout, V vocabulary."""

from typing import NamedTuple

import torch

# Log-ratios beyond this would overflow the ratio.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """Sums over the rollout tokens. Only `loss` is differentiable.

    Attributes:
        loss: the loss.
        clipped: number of tokens whose loss comes from the clipped ratio.
        clipped_dual: number of tokens with a negative advantage whose loss the dual clip has bounded.
        kl: sum of log p_old - log p_new, an estimate of KL(old || new).
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

    With the ratio q = p_new / p_old and the advantage A a token's loss is L = max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high)), and
    min(L, -A clip_dual) where A is negative.

    Args:
        logprobs_nk: log p_new, with gradient.
        old_logprobs_nk: log p_old, by the weights that made the rollouts. log q is cut to [-20, 20].
        advantages_nk: A of each token, broadcastable to `[n, k]`.
        clip_low, clip_high, clip_dual: as above.
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
    """Estimates KL(new || old) by the sum over tokens of q - log q - 1 with q = p_old / p_new.

    The estimate is never negative and of low variance (John Schulman, "Approximating KL divergence", 2020, where it is k3).
    """
    log_ratio = (old_logprobs_nk - logprobs_nk).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1).sum()


def token_entropy(logits_nkV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy of the policy at each token in nats, differentiable, `[n, k]`."""
    log_probs = _log_policy(logits_nkV, temperature)
    return -(log_probs.exp() * log_probs).sum(-1)


def chosen_logprobs(logits_nkV: torch.Tensor, tokens_nk: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token under the policy, `[n, k]`."""
    return _log_policy(logits_nkV, temperature).gather(-1, tokens_nk[..., None])[..., 0]


def _log_policy(logits_nkV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logarithm of the policy softmax(logits / temperature). Temperature 0, greedy sampling, counts as 1."""
    return (logits_nkV / temperature if temperature > 0 else logits_nkV).log_softmax(-1)
