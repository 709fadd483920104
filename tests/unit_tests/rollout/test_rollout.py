"""What engines share: sampling, order of prefixes, trust in log-probabilities, stop strings, pages."""

import math

import pytest
import torch

from refine_titan.models.shared_prefix import StateShape
from refine_titan.objective.losses import policy_loss
from refine_titan.rollout.completion import CompletionRequest, StopStrings
from refine_titan.rollout.engine import EngineError, RolloutRequest, Rollouts
from refine_titan.rollout.logprob_gate import GapWindow, importance_weights, refuse_gap
from refine_titan.rollout.pages import PageLayout
from refine_titan.rollout.sampling import sample_tokens, uniform_draws
from refine_titan.rollout.vllm_engine import reuse_order
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
    seeds = [
        derive_seed(42, "rollout", 1, 2),
        derive_seed(42, "rollout", 12),
        derive_seed(42, "positions", 1, 2),
        derive_seed(43, "rollout", 1, 2),
    ]
    assert len(set(seeds)) == 4 and seeds[0] == derive_seed(42, "rollout", 1, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_come_from_each_rollouts_own_seed():
    draws = uniform_draws((5, 6, 5), 4)
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert torch.equal(uniform_draws((6,), 4)[0], draws[1]) and draws.dtype == torch.float64


def test_prefixes_are_ordered_ascending_and_rank_major():
    cu_seqlens = (0, 100, 250, 400)
    starts = (90, 240, 20, 390, 20, 110, 100)
    order = reuse_order(cu_seqlens, starts)
    # Shortest prefix of every document, then the next ones; equal prefixes in the order asked for.
    assert [starts[i] for i in order] == [20, 110, 390, 20, 240, 90, 100] and order.index(2) < order.index(4)


def request_of(starts=(30, 60)) -> RolloutRequest:
    return RolloutRequest(torch.arange(100), (0, 100), starts, tuple(range(len(starts))), 3, 1.0, 12)


def rollouts_of(logprobs) -> Rollouts:
    return Rollouts(torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.tensor(logprobs), "vllm", 12)


TRAINER = torch.tensor([[-1.0, -1, -1], [-2, -2, -2]])


def test_gap_within_the_limit_passes():
    refuse_gap(0.5, request_of(), rollouts_of([[-1.0, -1, -1], [-2, -2, -2.4]]), TRAINER)


@pytest.mark.parametrize("rollout", [[-2, -2, float("nan")], [-2, -2, -float("inf")], [-2.6, -2.7, -3]])
def test_gap_that_cannot_be_rounding_names_weights_and_rollout(rollout):
    message = r"1 of 2 rollouts of weights version 12 .*rollout.max_logprob_gap = 0.5, .*: rollout 1 at position 60, token 2 \(id 6\)"
    with pytest.raises(EngineError, match=message):
        refuse_gap(0.5, request_of(), rollouts_of([[-1.0, -1, -1], rollout]), TRAINER)


def test_single_outlier_is_told_and_goes_on(caplog):
    window = GapWindow()
    with caplog.at_level("WARNING"):
        for _ in range(10):
            refuse_gap(0.5, request_of(), rollouts_of([[-1.0, -1, -1], [-2, -2, -4.5]]), TRAINER, window)
    assert len(caplog.records) == 10 and "1 of 6 rollout tokens of weights version 12" in caplog.text and "at most 2.5" in caplog.text
    with pytest.raises(EngineError, match="11 tokens of the last rounds"):
        refuse_gap(0.5, request_of(), rollouts_of([[-1.0, -1, -1], [-2, -2, -4.5]]), TRAINER, window)


def test_outliers_of_long_ago_are_forgotten():
    window = GapWindow()
    assert window.add(600, 9) == 9
    assert window.add(600, 2) == 11
    assert window.add(600, 1) == 3  # the first round is not among the last 1,024 tokens
    assert window.add(2000, 1) == 1


def test_importance_weights_are_truncated_ratios():
    trainer, engine = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0, -2.0, -2.0]])
    assert importance_weights(trainer, engine, 0.0) is None
    torch.testing.assert_close(importance_weights(trainer, engine, 2.0), torch.tensor([[1.0, 2.0, math.exp(-1)]]))


def test_weighted_policy_loss_is_the_sum_of_weighted_token_losses():
    logprobs, old, advantages, weights = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 1), torch.rand(3, 4)
    settings = dict(clip_low=0.2, clip_high=0.2, clip_dual=3.0)
    expected = sum(
        float(
            weights[i, j] * policy_loss(logprobs[i : i + 1, j : j + 1], old[i : i + 1, j : j + 1], advantages[i : i + 1], **settings).loss
        )
        for i in range(3)
        for j in range(4)
    )
    assert float(policy_loss(logprobs, old, advantages, weights=weights, **settings).loss) == pytest.approx(expected, rel=1e-5)


def test_stop_string_is_found_across_tokens_and_cut_off():
    vocabulary = ["a", "b", "ab", "c\n", "é"[:1]]
    stops = StopStrings(("bc", "zz"), lambda tokens: "".join(vocabulary[t] for t in tokens))
    assert not stops.ends([0, 1]) and stops.ends([0, 1, 3]) and stops.ends([0] * 200 + [2, 3])
    assert stops.text([0, 2, 3]) == "aa" and stops.text([0, 0]) == "aa"
    assert not StopStrings((), lambda tokens: "bc").ends([1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": ((1,), ())}, "prompt 1 is empty"),
        ({"max_tokens": (1, 0)}, "max_tokens is 0; allowed: at least 1"),
        ({"seeds": (1,)}, r"equally many, got \[2, 2, 1\]"),
        ({"stop_strings": ("a", "")}, "a stop string is empty"),
        ({"temperature": -1.0}, "temperature is -1.0; allowed: at least 0"),
        ({"prompts": (), "max_tokens": (), "seeds": ()}, "there are no prompts"),
    ],
)
def test_wrong_completion_requests_are_refused(changes, message):
    right = {"prompts": ((1,), (2,)), "max_tokens": (3, 4), "seeds": (5, 6)}
    CompletionRequest(**right)
    with pytest.raises(ValueError, match=message):
        CompletionRequest(**(right | changes))


def test_page_holds_every_tensor_of_a_state_aligned():
    shapes = {
        "wide": StateShape((3, 5), torch.float32),
        "narrow": StateShape((7,), torch.bfloat16),
        "last": StateShape((2,), torch.float32),
    }
    page = PageLayout(dict(sorted(shapes.items(), key=lambda item: -item[1].dtype.itemsize)))
    assert page.num_bytes == 128  # 60 + 8 + 14 bytes, padded to 64
    pages = torch.zeros(4, page.num_bytes, dtype=torch.int8)
    views = page.views(pages)
    for i, (name, view) in enumerate(views.items()):
        assert view.shape == (4, *shapes[name].shape) and view.dtype == shapes[name].dtype
        view.fill_(i + 1)
    assert all(bool((view == i + 1).all()) for i, view in enumerate(views.values()))  # none lies over another
