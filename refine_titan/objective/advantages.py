"""GRPO advantages. Legend: n rollouts."""

import torch

EPSILON = 1e-6


def group_advantages(rewards_n: torch.Tensor, group_size: int, *, divide_by_std: bool = True) -> torch.Tensor:
    """`(R - mean) / (std + 1e-6)` within consecutive groups; unbiased standard deviation. `[n]`.

    A group of one keeps mean 0 and standard deviation 1, as in the published code, so that its advantage is its reward.

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
