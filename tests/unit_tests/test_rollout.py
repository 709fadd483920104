"""Sampling: the distribution, its independence of the batch, greedy."""

import torch

from refine_titan.rollout.native import sample_tokens
from refine_titan.seeding import derive_seed, generator


def test_sampled_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5])
    draws = torch.rand(20000, generator=generator(0), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        tokens = sample_tokens(logits.expand(20000, 4), draws, temperature)
        found = torch.bincount(tokens, minlength=4) / 20000
        # 20000 draws: a standard error of at most 0.0036
        torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.015, rtol=0)


def test_temperature_zero_is_argmax():
    logits = torch.randn(5, 7)
    assert torch.equal(sample_tokens(logits, torch.rand(5, dtype=torch.float64), 0.0), logits.argmax(-1))


def test_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    extremes = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, extremes, 1.0).tolist() == [1, 1, 1]


def test_draw_depends_only_on_its_own_number():
    logits, draws = torch.randn(6, 9), torch.rand(6, dtype=torch.float64)
    together = sample_tokens(logits, draws, 1.0)
    alone = torch.cat([sample_tokens(logits[i : i + 1], draws[i : i + 1], 1.0) for i in range(6)])
    assert torch.equal(together, alone)


def test_seeds_differ_by_purpose_and_repeat():
    seeds = [derive_seed(42, "rollout", 1, 2), derive_seed(42, "rollout", 12), derive_seed(42, "positions", 1, 2), derive_seed(43, "rollout", 1, 2)]
    assert len(set(seeds)) == 4 and seeds[0] == derive_seed(42, "rollout", 1, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
