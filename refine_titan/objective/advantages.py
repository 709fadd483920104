"""GRPO advantages (arXiv 2402.03300), and those of RLOO (arXiv 2402.14740). Legend: n rollouts."""

from typing import Literal

import torch

EPSILON = 1e-6

# What a rollout's reward is compared with (`refine.advantage_baseline`).
Baseline = Literal["mean", "leave_one_out"]


def group_advantages(rewards_n: torch.Tensor, group_size: int, *, divide_by_std: bool = True, baseline: Baseline = "mean") -> torch.Tensor:
    """Compares rewards with those of their group: A = (R - baseline) / (std + 1e-6), `[n]`. The standard deviation is the unbiased one.

    A group of one keeps baseline 0 and standard deviation 1, as in the published code, so that its advantage is its reward.

    Args:
        rewards_n: the rewards, group after group.
        group_size: rollouts of a group.
        divide_by_std: False leaves A = R - baseline.
        baseline: `mean` of all rewards of the group, or for each rollout the mean of the other rollouts' rewards (`leave_one_out`).

    Raises:
        ValueError: if the rollouts do not divide into groups.
    """
    if group_size < 1 or rewards_n.numel() % group_size:
        raise ValueError(f"{rewards_n.numel()} rollouts do not divide into groups of {group_size}")
    if group_size == 1:
        return rewards_n / (1.0 + EPSILON) if divide_by_std else rewards_n.clone()
    groups = rewards_n.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        # R minus the mean of the others is R minus the mean of all, times n / (n - 1).
        centred = centred * (group_size / (group_size - 1))
    if divide_by_std:
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    return centred.view(-1)
