"""The ReFINE step verb by verb, on a small model with an engine whose rollouts are given."""

import random

import pytest
import torch
import torch.nn.functional as F

from refine_titan.config.batch_plan import RoundSizes
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import TokenBatch, pack
from refine_titan.data.packing import PackedSequence
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.advantages import group_advantages
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest, Rollouts
from refine_titan.seeding import derive_seed
from refine_titan.steps.checked_rollouts import CheckedRollouts, check_rollouts, sample_together
from refine_titan.steps.experience import Selection
from refine_titan.steps.refine_step import RefineStep
from tests.helpers import relative_rms
from tests.integration_tests.vllm_engines import trainer_logits
from tests.unit_tests.steps.small_step import small_step

pytestmark = pytest.mark.usefixtures("process_group")

LENGTH, CHUNKS, K = 192, 4, 3
OTHERS = ("gated_delta_net", "kda", "gated_delta_product", "qwen3_5", "olmo_hybrid")
FAMILIES = ["delta_net", "lact", *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]


class ScriptedEngine:
    """Samples what it is told, half of it the true continuation, with the log-probabilities of the weights that it last took over."""

    name, takes_states = "scripted", True

    def __init__(self):
        self.weight_version = None
        self.syncs, self.requests, self.naps = [], [], 0
        self.model, self.is_deaf, self.error = None, False, 0.0

    def sync_weights(self, version: int) -> None:
        self.syncs.append(version)
        if not self.is_deaf:
            self.weight_version = version

    def generate(self, request, prefix) -> Rollouts:
        if self.weight_version != request.weight_version:
            raise EngineError(f"the engine holds version {self.weight_version}")
        self.requests.append(request)
        tokens_nk = torch.stack([scripted(request.tokens_T, start, seed) for start, seed in zip(request.starts, request.seeds)])
        rollouts = Rollouts(tokens_nk, torch.zeros(tokens_nk.shape), self.name, self.weight_version, prefilled_tokens=7)
        logits_nkV = trainer_logits(self.model, request, rollouts)
        logprobs_nk = logits_nkV.log_softmax(-1).gather(-1, tokens_nk[..., None])[..., 0]
        return Rollouts(tokens_nk, logprobs_nk + self.error, self.name, self.weight_version, 7)

    def sleep(self) -> None:
        self.naps += 1

    def close(self) -> None:
        pass


def scripted(tokens_T: torch.Tensor, start: int, seed: int) -> torch.Tensor:
    draw = random.Random(seed)
    true = tokens_T[start : start + K].tolist()
    return torch.tensor([t if i < len(true) and draw.random() < 0.5 else draw.randrange(256) for i, t in enumerate((true + [0] * K)[:K])])


def job(**refine) -> JobConfig:
    config = JobConfig()
    config.training.seq_len, config.training.local_batch_size = LENGTH, 2
    settings = dict(num_chunks=CHUNKS, rollout_length=K, num_mini_batches=1, snapshot_stride=16, reward="hybrid") | refine
    for name, value in settings.items():
        setattr(config.refine, name, value)
    config.optimizer.lr = 1e-3
    return config


def microbatch(seed: int = 0) -> TokenBatch:
    """Two sequences: one document, and two."""
    draw = random.Random(seed)

    def document(length: int, name: str):
        return draw.choices(range(256), k=length), name

    return pack([PackedSequence([document(LENGTH, "a")]), PackedSequence([document(80, "b"), document(112, "c")])])


def build(family: str = "delta_net", round_size: int = 1, **refine) -> tuple[RefineStep, ScriptedEngine]:
    engine = ScriptedEngine()
    step = small_step(job(**refine), family, engine, round_sizes=RoundSizes(round_size, round_size))
    engine.model = step.runtime.model
    return step, engine


def sampled_and_checked(step: RefineStep, request: RolloutRequest, prefix: PrefixStates) -> CheckedRollouts:
    [sampled] = sample_together(step.engine, step.metrics, [request], [prefix], engine_sleeps=True)
    return check_rollouts(step.runtime, step.metrics, request, prefix, sampled)


def gradients(step: RefineStep) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in step.runtime.model.named_parameters() if p.grad is not None}


def test_score_reads_every_document_alone():
    step, _ = build()
    batch = microbatch()
    with torch.no_grad():
        out, bank = step.score(batch, step.runtime.shard_of(batch))
    assert out.losses.nll_sum is None and out.states == []
    for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
        rows = torch.arange(end - begin)
        alone = step.runtime.model(batch.tokens_T[begin:end], SharedPrefixLayout((0, end - begin)), logit_rows=rows)
        logprobs = alone.logits.log_softmax(-1)
        assert relative_rms(out.losses.entropy_T[begin:end], -(logprobs.exp() * logprobs).sum(-1)) < 1e-5
        assert relative_rms(out.hidden_TD[begin:end], alone.hidden_TD) < 1e-5
    inside = [r for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]) for r in range(begin + 16, end, 16)]
    assert list(bank.positions) == inside


def test_score_has_the_loss_where_it_is_the_training_forward():
    step, _ = build()
    batch = microbatch()
    out, _ = step.score(batch, step.runtime.shard_of(batch))
    logits = step.runtime.model(batch.tokens_T, SharedPrefixLayout(batch.cu_seqlens), logit_rows=torch.arange(2 * LENGTH)).logits
    assert float(out.losses.nll_sum.detach()) == pytest.approx(
        float(F.cross_entropy(logits, batch.labels_T, reduction="sum").detach()), rel=1e-5
    )


def test_select_draws_one_position_a_chunk_from_seed_step_and_sequence():
    step, _ = build(rollouts_per_position=2)
    batch, entropy_T = microbatch(), torch.rand(2 * LENGTH)
    shard = step.runtime.shard_of(batch)
    found = step.select(entropy_T, batch, 3, shard)
    assert len(found.starts) == 2 * CHUNKS * 2 and found.own == tuple(range(16)) and found.starts[::2] == found.starts[1::2]
    for i, start in enumerate(found.starts):
        sequence, chunk, sample = i // 8, i // 2 % 4, i % 2
        # Up to 20 tokens beyond the chunk: a start is kept that far from its document's ends.
        assert -20 <= start - sequence * LENGTH - chunk * LENGTH // CHUNKS <= LENGTH // CHUNKS + 20
        assert found.seeds[i] == derive_seed(42, "rollout", 1, 3 * 2 + sequence, chunk, sample)
    assert step.select(entropy_T, batch, 3, shard) == found
    step.begin(2)
    assert step.select(entropy_T, batch, 3, shard).starts != found.starts


def test_roll_out_asks_for_the_selection_and_rescores_what_comes():
    step, engine = build()
    batch = microbatch()
    shard = step.runtime.shard_of(batch)
    with torch.no_grad():
        _, bank = step.score(batch, shard)
        selection = step.select(torch.rand(2 * LENGTH), batch, 0, shard)
        request, prefix = step.ask(batch, shard, bank, selection)
        rollouts = sampled_and_checked(step, request, prefix)
    assert engine.requests == [request]
    assert (request.starts, request.seeds, request.length, request.temperature) == (selection.starts, selection.seeds, K, 1.0)
    assert request.weight_version == 0 and engine.syncs == [0] and engine.naps == 1
    assert relative_rms(rollouts.logits_nkV, trainer_logits(engine.model, request, rollouts.sampled)) < 1e-5
    assert (rollouts.logprobs_nk - rollouts.sampled.logprobs_nk).abs().max() < 1e-5 and rollouts.weights_nk is None


def test_engine_sleeps_only_before_a_backward():
    step, engine = build(scoring_pass="separate")
    step.run([microbatch(0), microbatch(1)], 2)
    assert len(engine.requests) == 2 and engine.naps == 1
    step, engine = build()
    step.run([microbatch(0), microbatch(1)], 2)
    assert len(engine.requests) == 2 and engine.naps == 2


@pytest.mark.parametrize("form", ["separate", "training"])
@pytest.mark.parametrize("family", ["delta_net", "lact", "qwen3_5"])
def test_microbatches_share_a_round_and_train_as_if_they_did_not(family, form):
    batches, found = [microbatch(seed) for seed in range(3)], {}
    for size in (1, 2, 3):
        step, engine = build(family, size, scoring_pass=form)
        step.run(batches, 3)
        found[size] = step, engine
        rounds = -(-3 // size)
        assert len(engine.requests) == rounds and engine.naps == (1 if form == "separate" else rounds)
        assert [len(request.tokens_T) for request in engine.requests] == [2 * LENGTH * n for n in {1: (1, 1, 1), 2: (1, 2), 3: (3,)}[size]]
    (alone, engine), parameters = found[1], {size: list(step.runtime.model.parameters()) for size, (step, _) in found.items()}
    for size in (2, 3):
        step, shared = found[size]
        assert [seed for r in shared.requests for seed in r.seeds] == [seed for r in engine.requests for seed in r.seeds]
        for mine, theirs in zip(step.recorder.rollouts, alone.recorder.rollouts, strict=True):
            assert torch.equal(mine[3].tokens_nk, theirs[3].tokens_nk) and mine[2] == theirs[2] and torch.equal(mine[5], theirs[5])
        assert all(torch.equal(*pair) for pair in zip(parameters[size], parameters[1])), size


def test_reward_advantages_and_record_are_those_of_the_definition():
    step, engine = build()
    batch = microbatch()
    shard = step.runtime.shard_of(batch)
    with torch.no_grad():
        out, _ = step.score(batch, shard)
        scored = step.score_and_select(batch, 0)
        selection = scored.selection
        assert selection == step.select(out.losses.entropy_T, batch, 0, shard)
        rollouts = sampled_and_checked(step, scored.request, scored.prefix)
        compared = step.compare(scored, rollouts)
        reward_n = step.reward(compared)
        advantages_n = step.advantages(reward_n, selection, shard)
    expected = []
    for i, start in enumerate(selection.starts):
        assert compared.true_tokens_nk[i].tolist() == batch.tokens_T[start : start + K].tolist()
        same = (rollouts.tokens_nk[i] == compared.true_tokens_nk[i]).float().mean()
        cosine = F.cosine_similarity(rollouts.hidden_nkD[i], out.hidden_TD[start : start + K], dim=-1).mean()
        expected.append(same + cosine)
    assert torch.allclose(reward_n, torch.stack(expected), atol=1e-6) and reward_n.dtype == torch.float32
    assert torch.equal(advantages_n, group_advantages(reward_n, CHUNKS))

    step.record(scored, rollouts, compared, reward_n, advantages_n)
    [recorded] = step.recorder.rollouts
    assert recorded == (1, batch, selection.starts, rollouts.sampled, compared.true_tokens_nk, reward_n, advantages_n)
    sums = step.metrics.sums
    assert sums["rollouts"] == 8 and sums["rollout_tokens"] == sums["importance_weight"] == 8 * K and sums["prefilled_tokens"] == 7
    assert float(sums["reward"]) == pytest.approx(float(reward_n.sum()))
    assert int(sums["matches"]) == int((rollouts.tokens_nk == compared.true_tokens_nk).sum()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_have_the_gradients_of_separate_prefixes(family, monkeypatch):
    """One pass for everything, and a scoring pass with a shared-prefix update, against a forward over every prefix and rollout."""
    found = {}
    for form in ("training", "separate"):
        step, engine = build(family, scoring_pass=form)
        monkeypatch.setattr(step.runtime.optimizers, "step", lambda: None)
        monkeypatch.setattr(step.runtime.optimizers, "zero_grad", lambda: None)
        step.runtime.config.training.max_norm = 1e9
        step.run([microbatch()], 1)
        found[form] = gradients(step)
    model, batch = step.runtime.model, microbatch()
    _, _, starts, rollouts, _, _, advantages_n = step.recorder.rollouts[0]
    model.zero_grad(set_to_none=True)
    nll = []
    for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
        rows = torch.arange(end - begin - 1)
        logits = model(batch.tokens_T[begin:end], SharedPrefixLayout((0, end - begin)), logit_rows=rows).logits
        nll.append(F.cross_entropy(logits, batch.tokens_T[begin + 1 : end], reduction="none"))
    loss = torch.cat(nll).mean()
    for i, start in enumerate(starts):
        begin = max(b for b in batch.cu_seqlens if b < start)
        stream = torch.cat([batch.tokens_T[begin:start], rollouts.tokens_nk[i]])
        rows = torch.arange(start - begin - 1, len(stream) - 1)
        logits = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits
        logprobs = logits.log_softmax(-1).gather(-1, rollouts.tokens_nk[i][:, None])
        # On the first update of a batch the ratio is 1 and the gradient that of the log-probability.
        loss = loss - 0.2 * advantages_n[i] * logprobs.sum() / (len(starts) * K)
    loss.backward()
    expected = gradients(step)
    for form in found:
        assert found[form].keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_rms(found[form][name], gradient) < 2e-5, (form, name)


def test_rank_without_rollouts_runs_one_that_trains_nothing():
    step, engine = build()
    batch = microbatch()
    shard = step.runtime.shard_of(batch)
    selection = Selection((30, 90), (1, 2), own=())
    step.group_size = 2
    step.select = lambda *_: selection
    scored = step.score_and_select(batch, 0)
    rollouts = sampled_and_checked(step, scored.request, scored.prefix)
    assert engine.requests[0].starts == (2 * LENGTH,) and engine.requests[0].seeds == (0,)
    compared = step.compare(scored, rollouts)
    reward_n = step.reward(compared)
    advantages_n = step.advantages(reward_n, selection, shard)
    assert compared.true_tokens_nk.shape == (0, K) and reward_n.shape == advantages_n.shape == (0,)
    step.record(scored, rollouts, compared, reward_n, advantages_n)
    assert step.metrics.sums["rollouts"] == 0 and not step.recorder.rollouts
    experience = step.experience(scored, rollouts, advantages_n)
    assert experience.advantages_n is None and experience.starts == (2 * LENGTH,)

    step, engine = build(scoring_pass="separate")
    step.metrics.add(policy_tokens=0)
    normalizers = step.normalizers([batch])
    step.loss(step.shared_prefix_pass(batch, experience), normalizers).backward()
    with_stand_in = gradients(step)
    step.runtime.model.zero_grad(set_to_none=True)
    step.loss(step.trunk_pass(batch), normalizers).backward()
    for name, gradient in gradients(step).items():
        assert relative_rms(with_stand_in[name], gradient) < 1e-5, name


def test_weights_are_synchronised_once_a_version():
    step, engine = build(scoring_pass="separate", num_mini_batches=2)
    step.run([microbatch(0), microbatch(1)], 1)
    assert step.update_count == 2 and engine.syncs == [0] and [r.weight_version for r in engine.requests] == [0, 0]
    step.begin(2)
    step.run([microbatch(0), microbatch(1)], 1)
    assert step.update_count == 4 and engine.syncs == [0, 2]


def test_engine_that_does_not_take_the_weights_ends_the_step():
    step, engine = build()
    step.run([microbatch()], 1)
    engine.is_deaf = True
    before = {name: p.clone() for name, p in step.runtime.model.named_parameters()}
    with pytest.raises(EngineError, match="holds version 0"):
        step.run([microbatch()], 1)
    assert engine.syncs == [0, 1] and step.update_count == 1
    assert all(torch.equal(p, before[name]) for name, p in step.runtime.model.named_parameters())


def test_engine_with_other_probabilities_is_refused():
    step, engine = build()
    engine.error = 1.5
    with pytest.raises(EngineError, match=r"8 of 8 rollouts of weights version 0 .* rollout.max_logprob_gap = 1.0"):
        step.run([microbatch()], 1)
    assert step.update_count == 0 and not step.recorder.rollouts


def test_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    step, engine = build()
    model = step.runtime.model
    step.run([microbatch()], 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step.begin(2)
    handle = model.norm.register_forward_hook(lambda module, inputs, output: output * torch.inf if output.requires_grad else output)
    normalizers = step.normalizers([microbatch()])
    step.update(iter([step.loss(step.trunk_pass(microbatch()), normalizers)]))
    handle.remove()
    assert (step.update_count, step.skipped_updates, step.metrics.skipped_updates) == (1, 1, 1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(torch.isnan(v).any() for state in step.runtime.optimizers.optimizers[0].state.values() for v in state.values())
    step.run([microbatch()], 1)
    assert step.update_count == 2 and engine.syncs == [0, 1]
