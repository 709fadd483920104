"""Advantages against their definition, rollout by rollout."""

import pytest
import torch

from refine_titan.objective.advantages import group_advantages


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_an_advantage_is_the_reward_less_the_mean_of_the_group(group_size, divide_by_std):
    rewards = torch.randn(24, dtype=torch.float64)
    found = group_advantages(rewards, group_size, divide_by_std=divide_by_std)
    for i, advantage in enumerate(found.tolist()):
        group = rewards[i // group_size * group_size :][:group_size].tolist()
        mean = sum(group) / group_size
        expected = float(rewards[i]) - mean
        if divide_by_std:
            expected /= (sum((r - mean) ** 2 for r in group) / (group_size - 1)) ** 0.5 + 1e-6
        assert advantage == pytest.approx(expected, rel=1e-9)  # float64
