"""Advantages against their definitions, rollout by rollout."""

import pytest
import torch

from refine_titan.errors import UserError
from refine_titan.objective.advantages import group_advantages
from refine_titan.validation import load_config


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_leave_one_out_compares_with_the_mean_of_the_others(group_size, divide_by_std):
    rewards = torch.randn(24, dtype=torch.float64)
    found = group_advantages(rewards, group_size, divide_by_std=divide_by_std, baseline="leave_one_out")
    for i, advantage in enumerate(found.tolist()):
        group = rewards[i // group_size * group_size :][:group_size].tolist()
        others = group[: i % group_size] + group[i % group_size + 1 :]
        expected = float(rewards[i]) - sum(others) / len(others)
        if divide_by_std:
            mean = sum(group) / group_size
            expected /= (sum((r - mean) ** 2 for r in group) / (group_size - 1)) ** 0.5 + 1e-6
        assert advantage == pytest.approx(expected, rel=1e-9)  # float64


def test_leave_one_out_needs_others(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[refine]\nadvantage_group = 'position'\nallow_groups_of_one = true\nadvantage_baseline = 'leave_one_out'")
    with pytest.raises(UserError, match="refine.advantage_baseline is 'leave_one_out'; allowed: 'mean' with groups of one rollout"):
        load_config(["--job.config_file", str(config)])
