"""The outer step of post-training against separate forwards over prompt and answer: loss, every gradient, and where it enters."""

import pytest
import torch

from refine_titan.config.batch_plan import RoundSizes
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import TokenBatch, build_dataloader
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.steps.outer_step import OuterStep
from tests.helpers import relative_rms
from tests.questions import write_questions
from tests.unit_tests.steps.small_step import small_step

pytestmark = pytest.mark.usefixtures("process_group")


def job(source, **posttrain) -> JobConfig:
    config = JobConfig()
    config.refine.phase, config.refine.num_chunks = "posttrain", 2
    config.training.seq_len, config.training.local_batch_size = 260, 3
    config.data.source, config.data.shuffle_buffer = str(source), 1
    config.posttrain.answer_tokens = 12
    for name, value in posttrain.items():
        setattr(config.posttrain, name, value)
    return config


@pytest.fixture
def source(tmp_path):
    write_questions(tmp_path / "a.jsonl")
    return tmp_path / "a.jsonl"


def batches_of(config: JobConfig, count: int) -> list[TokenBatch]:
    data = build_dataloader(1, 0, ByteTokenizer(), config)
    return [data.next_batch() for _ in range(count)]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def prompt(batch: TokenBatch, i: int) -> torch.Tensor:
    return batch.tokens_T[batch.cu_sequences[i] : batch.cu_sequences[i + 1]]


@pytest.mark.parametrize(
    "family",
    ["delta_net", "lact", "qwen3_5", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gated_delta_net", "kda", "olmo_hybrid"))],
)
def test_loss_and_gradients_are_those_of_prompt_and_answer_read_as_one(source, family):
    config = job(source)
    step = small_step(config, family)
    outer, model, batches = OuterStep(step, ByteTokenizer(), step.recorder), step.runtime.model, batches_of(config, 2)
    num_tokens = sum(len(answer) for batch in batches for answer in batch.answers)
    loss = sum(outer.answer_loss(batch, num_tokens) for batch in batches)
    loss.backward()
    found = gradients(model)

    nll = []
    for batch in batches:
        for i, answer in enumerate(batch.answers):
            stream = torch.cat([prompt(batch, i), torch.tensor(answer)])
            rows = torch.arange(len(stream) - len(answer) - 1, len(stream) - 1)
            logits = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits
            nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    expected = torch.cat(nll).mean()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert relative_rms(found[name], gradient) < 1e-5, name
    assert step.metrics.sums["answer_tokens"] == num_tokens == torch.cat(nll).numel()


def test_prompt_tokens_carry_no_gradient_of_their_own(source):
    """Where the loss enters: the rows of the head's input that have a gradient predict answer tokens, and no other has any."""
    config = job(source)
    step = small_step(config, "delta_net")
    (batch,) = batches_of(config, 1)
    kept = []
    step.runtime.model.norm.register_forward_hook(lambda module, inputs, output: kept.append(output) or output.retain_grad())
    OuterStep(step, ByteTokenizer(), step.recorder).answer_loss(batch, 1.0).backward()
    has_gradient = (kept[0].grad != 0).any(1)
    longest = max(len(answer) for answer in batch.answers)
    expected = torch.zeros(batch.tokens_T.shape[0] + len(batch.answers) * longest, dtype=torch.bool)
    for i, answer in enumerate(batch.answers):
        expected[batch.cu_sequences[i + 1] - 1] = True  # predicts the first answer token
        begin = batch.tokens_T.shape[0] + i * longest
        expected[begin : begin + len(answer) - 1] = True  # these predict the others; the last one nothing
    assert torch.equal(has_gradient, expected)
    assert 0 < int(expected[: batch.tokens_T.shape[0]].sum()) == batch.num_sequences


def test_prompt_does_change_the_answers_loss(source):
    """The counterpart: the prompt is read, so its embeddings have a gradient from the answer."""
    config = job(source)
    step = small_step(config, "delta_net")
    (batch,) = batches_of(config, 1)
    OuterStep(step, ByteTokenizer(), step.recorder).answer_loss(batch, 1.0).backward()
    gradient = step.runtime.model.tok_embeddings.weight.grad
    assert gradient[ord("?")].norm() > 0 and not any(ord("?") in answer for answer in batch.answers)


def fraction_of_e(response: str, answers) -> float:
    return response.count("e") / 8 + (answers[0] in response)


def test_rewarded_answers_move_towards_what_is_rewarded(source):
    """GRPO on whole answers: after steps on one batch the tokens that the scorer likes are sampled more often."""
    config = job(source, outer="reward", samples=8, answer_tokens=8)
    config.optimizer.lr = 1e-2
    step = small_step(config, "delta_net")
    outer, batches = OuterStep(step, ByteTokenizer(), step.recorder, fraction_of_e), batches_of(config, 1)
    rewards = []
    for number in range(1, 11):
        step.begin(number)
        outer.run(batches)
        result = step.metrics.result(config.refine, None)
        rewards.append(result["rollout/task_reward"])
        assert (
            result["rollout/answer_logprob_gap_max"] < 1e-4
            and result["refine/outer_grad_norm"] > 0
            or result["rollout/task_reward_std"] == 0
        )
        assert result["refine/ntp_loss"] is None and 24 <= result["refine/answer_tokens"] <= 192
    assert step.update_count == 10 and sum(rewards[-3:]) > 2 * sum(rewards[:3]) > 0
    _, _, starts, rollouts, texts, references, reward_n, _ = step.recorder.answers[0]
    assert len(texts) == len(starts) == 24 and rollouts.tokens_nk.shape == (24, 8)
    assert [round(float(r), 5) for r in reward_n] == [round(fraction_of_e(*pair), 5) for pair in zip(texts, references)]


@pytest.mark.parametrize("size", [1, 3])
def test_answers_are_sampled_in_rounds_of_their_own_size(source, size):
    """However many microbatches the inner steps sample rollouts for: what is read before a round of answers waits with its graph."""
    config = job(source, outer="reward", samples=2, answer_tokens=4)
    step = small_step(config, "delta_net", round_sizes=RoundSizes(scored=3, trained=3, answers=size))
    outer = OuterStep(step, ByteTokenizer(), step.recorder, fraction_of_e)
    asked, ask = [], outer.ask
    outer.ask = lambda batch, microbatch: asked.append(microbatch) or ask(batch, microbatch)
    next(outer.reward_losses(batches_of(config, 3)))
    assert asked == list(range(size))


@pytest.mark.parametrize("family", ["delta_net", "qwen3_5"])
def test_rewarded_gradient_is_that_of_each_answers_mean_log_probability(source, family):
    """Against separate forwards over prompt and sampled answer; an answer ends with end-of-sequence, which is learnt."""
    config = job(source, outer="reward", samples=4, answer_tokens=6)
    step = small_step(config, family)
    (batch,) = batches_of(config, 1)
    tokenizer, model = ByteTokenizer(), step.runtime.model
    outer = OuterStep(step, tokenizer, step.recorder, lambda response, answers: len(response) / 10)
    next(outer.reward_losses([batch]))
    sampled_nk = step.recorder.answers[0][3].tokens_nk
    outer.stop_tokens = stops = (int(sampled_nk[1, 2]), int(sampled_nk[0, 4]))  # the same draws again, with an answer that ends early
    step.begin(1)
    next(outer.reward_losses([batch])).backward()
    found = gradients(model)

    _, _, _, rollouts, texts, _, _, advantages_n = step.recorder.answers[1]
    losses, lengths = [], []
    for i, (tokens, advantage) in enumerate(zip(rollouts.tokens_nk.tolist(), advantages_n)):
        answer = tokens[: min((tokens.index(stop) + 1 for stop in stops if stop in tokens), default=len(tokens))]
        assert texts[i] == tokenizer.decode([token for token in answer if token not in stops])
        stream = torch.cat([prompt(batch, i // 4), torch.tensor(answer)])
        rows = torch.arange(len(stream) - len(answer) - 1, len(stream) - 1)
        logits = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits
        losses.append(-advantage * logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())
        lengths.append(len(answer))
    (sum(losses) / 12).backward()
    assert lengths[1] <= 3 and step.metrics.sums["answer_tokens"] == sum(lengths)
    for name, gradient in gradients(model).items():
        assert relative_rms(found[name], gradient) < 1e-5, name
