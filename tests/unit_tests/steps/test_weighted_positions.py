"""Next-token training that weighs the tokens after chosen positions: gradients against separate forwards, in float64."""

import pytest
import torch
import torch.nn.functional as F

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.positions import SELECTIONS, select_positions
from refine_titan.seeding import generator
from refine_titan.steps.refine_step import RefineStep
from refine_titan.steps.weighted_positions import predicting_tokens
from tests.helpers import relative_rms
from tests.unit_tests.steps.small_step import small_step
from tests.unit_tests.steps.test_refine_step import CHUNKS, LENGTH, K, gradients, job, microbatch

pytestmark = pytest.mark.usefixtures("process_group")
WEIGHT = 7.5


def build(selection: str, family: str = "delta_net") -> RefineStep:
    step = small_step(job(objective="weighted_ntp", position_weight=WEIGHT, selection=selection, context_window=16, ntp_coef=0.5), family)
    step.runtime.model.double()
    return step


def logits_of_documents(step: RefineStep, batch) -> torch.Tensor:
    model, parts = step.runtime.model, []
    for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
        parts.append(model(batch.tokens_T[begin:end], SharedPrefixLayout((0, end - begin)), logit_rows=torch.arange(end - begin)).logits)
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["delta_net", pytest.param("lact", marks=pytest.mark.slow)])
@pytest.mark.parametrize("selection", ["entropy", "uniform", "argmax", "context_gain"])
def test_gradient_is_that_of_weighted_cross_entropy(selection, family, monkeypatch):
    step, batch, chosen = build(selection, family), microbatch(), []
    monkeypatch.setattr(step.runtime.optimizers, "step", lambda: None)
    monkeypatch.setattr(step.runtime.optimizers, "zero_grad", lambda: None)
    step.runtime.config.training.max_norm = 1e9
    select = step.select
    monkeypatch.setattr(step, "select", lambda *arguments: chosen.append(select(*arguments)) or chosen[-1])
    assert step.run([batch], 1) == 1 and step.engine is None
    found = gradients(step)
    step.runtime.model.zero_grad(set_to_none=True)

    [starts] = [selection.starts for selection in chosen]
    assert len(starts) == 2 * CHUNKS
    weights_T = torch.ones(2 * LENGTH, dtype=torch.float64)
    for start in starts:
        weights_T[start - 1 : start - 1 + K] = 1 + WEIGHT
    nll_T = F.cross_entropy(logits_of_documents(step, batch), batch.labels_T, reduction="none")
    (0.5 * (weights_T * nll_T).sum() / batch.num_labels).backward()
    for name, gradient in gradients(step).items():
        assert relative_rms(found[name], gradient) < 1e-9, name

    nll_T = nll_T.detach()
    metrics = step.metrics.result(step.refine, None)
    assert metrics["refine/ntp_loss"] == pytest.approx(float(nll_T.sum()) / batch.num_labels)
    assert metrics["refine/position_loss"] == pytest.approx(float(nll_T[weights_T > 1].mean()))
    assert metrics["loss_metrics/global_avg_loss"] == pytest.approx(0.5 * float((weights_T * nll_T).sum()) / batch.num_labels)


def test_positions_are_those_that_rollouts_would_start_at():
    step, batch = build("entropy"), microbatch()
    starts = step.choose(batch, 0, step.runtime.shard_of(batch))
    log_p = logits_of_documents(step, batch).detach().log_softmax(-1)
    entropy_T, expected = -(log_p.exp() * log_p).sum(-1), []
    for sequence in range(2):
        first = sequence * LENGTH
        expected += [
            first + start
            for start in select_positions(
                entropy_T[first : first + LENGTH],
                batch.documents_of_sequence(sequence),
                num_chunks=CHUNKS,
                rollout_length=K,
                selection=SELECTIONS["entropy"],
                temperature=1.0,
                generator=generator(42, "positions", 1, sequence),
            )
        ]
    assert list(starts) == expected


def test_token_after_two_positions_counts_once_and_ranks_share_them():
    whole = ContextShard((0, 100), 0, 100)
    assert predicting_tokens((30, 32, 32, 51), 3, whole) == [29, 30, 31, 32, 33, 50, 51, 52]
    parts = [predicting_tokens((30, 32, 32, 51), 3, ContextShard((0, 100), begin, begin + 50)) for begin in (0, 50)]
    assert parts == [[29, 30, 31, 32, 33], [50, 51, 52]]
