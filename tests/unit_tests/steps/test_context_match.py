"""The reward `context_match` in a step: gains against separate forwards, in float64."""

import pytest
import torch

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.context_windows import windows_of
from refine_titan.models.shared_prefix import SharedPrefixLayout
from tests.unit_tests.steps.test_refine_step import CHUNKS, K, build, microbatch, sampled_and_checked

pytestmark = pytest.mark.usefixtures("process_group")
WIDTH = 16


@pytest.mark.parametrize("grad", [False, True])
def test_right_tokens_earn_what_the_context_tells_about_them(grad):
    step, engine = build(reward="context_match", context_window=WIDTH, selection="uniform")
    model = step.runtime.model.double()
    batch = microbatch()
    with torch.set_grad_enabled(grad):
        scored = step.score_and_select(batch, 0)
    with torch.no_grad():
        rollouts = sampled_and_checked(step, scored.request, scored.prefix)
        compared = step.compare(scored, rollouts)
        reward_n = step.reward(compared)
        step.metrics.add_builtin_rewards(compared)

    def logprob(begin: int, token: int) -> float:
        context = batch.tokens_T[begin:token]
        logits = model(context, SharedPrefixLayout((0, len(context))), logit_rows=torch.tensor([len(context) - 1])).logits
        return float(logits[0].detach().log_softmax(-1)[batch.tokens_T[token]])

    windows, expected, gains = windows_of(ContextShard.of_rank(batch.cu_seqlens, None), WIDTH), [], []
    for start, tokens in zip(scored.selection.starts, rollouts.tokens_nk):
        document = max(b for b in batch.cu_seqlens if b < start)
        terms = []
        for j in range(K):
            # The token before `start + j` predicts it; the window in which that one counts is its short context.
            begin = next((w.begin for w in windows if w.counted <= start + j - 1 < w.end), document)
            gains.append(logprob(document, start + j) - logprob(begin, start + j))
            terms.append(max(gains[-1], 0) * (tokens[j] == batch.tokens_T[start + j]))
        expected.append(sum(terms) / K)
    torch.testing.assert_close(compared.gain_nk.flatten(), torch.tensor(gains, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reward_n.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert len(expected) == 2 * CHUNKS and 0 < sum(e > 0 for e in expected) < 8
    assert float(step.metrics.sums["reward_context_match"]) == pytest.approx(sum(map(float, expected)), rel=1e-5)


def test_gains_are_not_measured_unless_they_are_asked_for():
    step, _ = build()
    scored = step.score_and_select(microbatch(), 0)
    assert scored.gain_nk is None and "context" not in step.metrics.seconds
    assert "rollout/reward_context_match_mean" not in step.metrics.result(step.refine, None)
