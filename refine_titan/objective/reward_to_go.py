"""Advantages by token: each is made of the rewards of its own token and of those after it, which are all that it has caused.

Legend: n rollouts, k tokens of a rollout.
"""

from collections.abc import Callable

import torch


def reward_to_go(terms_nk: torch.Tensor) -> torch.Tensor:
    """The part of each rollout's reward that its tokens from j on give, `[n, k]`: sum over i >= j of the terms, divided by k. The first
    is the reward of the whole rollout.

    Args:
        terms_nk: rewards of the tokens, whose mean is the rollout's reward.
    """
    return terms_nk.flip(1).cumsum(1).flip(1) / terms_nk.shape[1]


def by_token(compare: Callable[[torch.Tensor], torch.Tensor], rewards_nk: torch.Tensor) -> torch.Tensor:
    """Compares rewards within their groups at each token index, `[n, k]`.

    Args:
        compare: turns the rewards of n rollouts into advantages.
    """
    return torch.stack([compare(rewards_n) for rewards_n in rewards_nk.unbind(1)], 1)
