"""Selection, rewards, advantages and policy loss against golden vectors of the published implementation."""

import pytest
import torch
from safetensors.torch import load_file

from refine_titan.objective.advantages import group_advantages
from refine_titan.objective.losses import kl_penalty, policy_loss, token_entropy
from refine_titan.objective.positions import MARGIN, SELECTIONS, select_positions, smooth_entropy
from refine_titan.objective.rewards import REWARDS, RewardInputs
from refine_titan.seeding import generator


def rows_without_padding(golden, case):
    """(row, first valid index, entropy of the valid part) for each row of a left-padded case."""
    for row, mask in enumerate(golden[f"{case}.mask"]):
        first = int((mask == 0).sum())
        yield row, first, golden[f"{case}.entropy"][row, first:]


@pytest.mark.parametrize("case", ["k1", "k4", "k5"])
def test_smoothed_entropy_equals_golden(oracles, case):
    golden = load_file(oracles / "selection.safetensors")
    k = int(golden[f"{case}.k_chunks"][0])
    for row, entropy in enumerate(golden[f"{case}.entropy"]):
        torch.testing.assert_close(smooth_entropy(entropy, k), golden[f"{case}.smoothed"][row])


@pytest.mark.parametrize("case", ["k1", "k4", "k5"])
@pytest.mark.parametrize("mode", ["argmax", "argmin"])
def test_extreme_positions_equal_golden(oracles, case, mode):
    golden = load_file(oracles / "selection.safetensors")
    k, c = golden[f"{case}.k_chunks"].tolist()
    prefix_lengths = golden[f"{case}.{mode}_prefix_len"].view(-1, c)
    truths = golden[f"{case}.{mode}_ground_truth_ids"].view(-1, c, k)
    for row, first, entropy in rows_without_padding(golden, case):
        starts = select_positions(
            entropy,
            (0, len(entropy)),
            num_chunks=c,
            rollout_length=k,
            selection=SELECTIONS[mode],
            temperature=1.0,
            generator=torch.Generator(),
        )
        assert starts == prefix_lengths[row].tolist()
        for start, truth in zip(starts, truths[row]):
            assert golden[f"{case}.input_ids"][row, first + start : first + start + k].tolist() == truth.tolist()


@pytest.mark.parametrize("case", ["k1", "k4", "k5"])
def test_entropy_weighted_positions_follow_golden_frequencies(oracles, case):
    golden = load_file(oracles / "selection.safetensors")
    k, c = golden[f"{case}.k_chunks"].tolist()
    for row, first, entropy in rows_without_padding(golden, case):
        counts = torch.zeros(golden[f"{case}.entropy"].shape[1])
        for draw in range(600):
            for start in select_positions(
                entropy,
                (0, len(entropy)),
                num_chunks=c,
                rollout_length=k,
                selection=SELECTIONS["entropy"],
                temperature=1.0,
                generator=generator(0, case, row, draw),
            ):
                counts[first + start] += 1
        expected = golden[f"{case}.entropy_mode_counts_600"][row]
        assert counts.sum() == expected.sum()
        # Both are samples of 600 draws: a cell differs by about sqrt(2 n p (1-p)); 5 of that never happens by chance.
        spread = (counts + expected + 1).sqrt()
        assert ((counts - expected).abs() / spread).max() < 5
        # and the clamped ends, where the counts are large, fix the weights of whole stretches.
        assert (counts - expected).abs().sum() / expected.sum() < 0.35


def test_positions_stay_inside_their_document():
    cu_seqlens = (0, 300, 330, 800)  # the middle document is too short to start in
    for draw in range(50):
        starts = select_positions(
            torch.rand(800),
            cu_seqlens,
            num_chunks=8,
            rollout_length=5,
            selection=SELECTIONS["uniform"],
            temperature=1.0,
            generator=generator(draw),
        )
        assert len(starts) == 8
        for start in starts:
            assert MARGIN <= start <= 300 - MARGIN or 330 + MARGIN <= start <= 800 - MARGIN


def test_chunk_without_room_is_refused():
    with pytest.raises(ValueError, match="min_document_tokens"):
        select_positions(
            torch.rand(120),
            (0, 30, 60, 90, 120),
            num_chunks=2,
            rollout_length=5,
            selection=SELECTIONS["entropy"],
            temperature=1.0,
            generator=torch.Generator(),
        )


@pytest.mark.parametrize("kind, name", [("cosine", "cosine_similarity"), ("binary", "binary"), ("hybrid", "hybrid")])
def test_rewards_equal_golden(oracles, kind, name):
    golden = load_file(oracles / "reward_grpo.safetensors")
    inputs = RewardInputs(
        golden["rollout_ids"],
        golden["ground_truth_ids"],
        golden["rollout_hidden"],
        golden["ground_truth_hidden"],
        golden["old_logprobs"],
        decode=str,
    )
    torch.testing.assert_close(REWARDS[kind](inputs), golden[f"reward_{name}"])


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("groups, group_size", [("by_sequence", 8), ("singletons", 1)])
def test_advantages_equal_golden(oracles, divide_by_std, groups, group_size):
    golden = load_file(oracles / "reward_grpo.safetensors")
    expected = golden[f"advantage_{groups}_norm{int(divide_by_std)}"]
    # The golden advantages are those of the hybrid reward.
    advantages = group_advantages(golden["reward_hybrid"], group_size, divide_by_std=divide_by_std)
    torch.testing.assert_close(advantages[:, None].expand_as(expected), expected, rtol=1e-5, atol=1e-6)


def test_policy_loss_and_gradient_equal_golden(oracles):
    golden = load_file(oracles / "reward_grpo.safetensors")
    logprobs = golden["new_logprobs"].clone().requires_grad_()
    result = policy_loss(logprobs, golden["old_logprobs"], golden["pg_advantages"], clip_low=0.2, clip_high=0.2, clip_dual=3.0)
    count = logprobs.numel()
    (result.loss / count).backward()
    torch.testing.assert_close(result.loss.detach() / count, golden["pg_loss"])
    torch.testing.assert_close(logprobs.grad, golden["grad_new_logprobs"])
    torch.testing.assert_close(result.clipped / count, golden["pg_clipfrac"])
    torch.testing.assert_close(result.clipped_dual / count, golden["pg_clipfrac_lower"])
    torch.testing.assert_close(result.kl / count, golden["ppo_kl"])


def test_kl_penalty_is_zero_at_equality_and_positive_elsewhere():
    logprobs = -torch.rand(4, 5)
    assert kl_penalty(logprobs, logprobs) == 0
    assert kl_penalty(logprobs, logprobs - 0.3) > 0


def test_token_entropy_of_a_uniform_distribution_is_log_of_its_size():
    torch.testing.assert_close(token_entropy(torch.zeros(3, 7)), torch.full((3,), 7.0).log())
