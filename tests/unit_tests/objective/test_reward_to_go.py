"""Advantages by token against their definition."""

import pytest
import torch

from refine_titan.objective.advantages import group_advantages
from refine_titan.objective.reward_to_go import by_token, reward_to_go
from refine_titan.objective.rewards import REWARDS, TOKEN_REWARDS, RewardInputs


def test_token_has_the_rewards_from_itself_on_compared_at_its_index():
    terms = torch.randn(12, 5, dtype=torch.float64)
    found = by_token(lambda rewards: group_advantages(rewards, 4), reward_to_go(terms))
    for i in range(12):
        for j in range(5):
            group = [sum(terms[m, j:].tolist()) / 5 for m in range(i // 4 * 4, i // 4 * 4 + 4)]
            mean = sum(group) / 4
            std = (sum((g - mean) ** 2 for g in group) / 3) ** 0.5
            assert float(found[i, j]) == pytest.approx((group[i % 4] - mean) / (std + 1e-6), rel=1e-9)  # float64


def test_rewards_are_the_means_of_their_tokens():
    inputs = RewardInputs(*torch.randint(2, (2, 6, 3)), *torch.randn(2, 6, 3, 8), torch.zeros(6, 3), str, torch.randn(6, 3))
    assert TOKEN_REWARDS.keys() == REWARDS.keys()
    for name, terms in TOKEN_REWARDS.items():
        torch.testing.assert_close(terms(inputs).mean(1), REWARDS[name](inputs))
        torch.testing.assert_close(reward_to_go(terms(inputs))[:, 0], REWARDS[name](inputs))
    changed = RewardInputs(inputs.tokens_nk.clone(), *list(vars(inputs).values())[1:])
    changed.tokens_nk[:, 2] = 1 - changed.tokens_nk[:, 2]
    assert torch.equal(TOKEN_REWARDS["binary"](changed)[:, :2], TOKEN_REWARDS["binary"](inputs)[:, :2])
