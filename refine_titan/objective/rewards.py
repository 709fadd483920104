"""Rewards of rollouts against the true continuation (paper section 3.2).

Legend: n rollouts, k tokens, D hidden channels.
"""

import torch
import torch.nn.functional as F


def cosine_reward(rollout_hidden_nkD: torch.Tensor, truth_hidden_nkD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the cosine between the final-norm hidden states at rollout and true tokens; float32 `[n]`."""
    return F.cosine_similarity(rollout_hidden_nkD.float(), truth_hidden_nkD.float(), dim=-1).mean(-1)


def binary_reward(rollout_tokens_nk: torch.Tensor, truth_tokens_nk: torch.Tensor) -> torch.Tensor:
    """Share of tokens that equal the true ones; float32 `[n]`."""
    return (rollout_tokens_nk == truth_tokens_nk).float().mean(-1)


def rollout_rewards(
    kind: str,
    rollout_tokens_nk: torch.Tensor,
    truth_tokens_nk: torch.Tensor,
    rollout_hidden_nkD: torch.Tensor,
    truth_hidden_nkD: torch.Tensor,
) -> torch.Tensor:
    """Reward of the given kind: `cosine`, `binary`, or `hybrid` (their sum); float32 `[n]`."""
    if kind == "binary":
        return binary_reward(rollout_tokens_nk, truth_tokens_nk)
    cosine = cosine_reward(rollout_hidden_nkD, truth_hidden_nkD)
    return cosine if kind == "cosine" else cosine + binary_reward(rollout_tokens_nk, truth_tokens_nk)
