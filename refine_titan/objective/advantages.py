"""GRPO advantages (arXiv 2402.03300). Legend: n rollouts."""

import torch

EPSILON = 1e-6


def group_advantages(rewards_n: torch.Tensor, group_size: int, *, divide_by_std: bool = True) -> torch.Tensor:
    """Compares rewards with those of their group: A = (R - mean) / (std + 1e-6), `[n]`. The standard deviation is the unbiased one.

    A group of one keeps mean 0 and standard deviation 1, as in the published code, so that its advantage is its reward.

    Args:
        rewards_n: the rewards, group after group.
        group_size: rollouts of a group.
        divide_by_std: False leaves A = R - mean.

    Raises:
        ValueError: if the rollouts do not divide into groups.
    """
    if group_size < 1 or rewards_n.numel() % group_size:
        raise ValueError(f"{rewards_n.numel()} rollouts do not divide into groups of {group_size}")
    if group_size == 1:
        return rewards_n / (1.0 + EPSILON) if divide_by_std else rewards_n.clone()
    groups = rewards_n.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    return centred.view(-1)
