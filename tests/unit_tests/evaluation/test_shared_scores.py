"""Ranks that evaluate during training: shares that add up to one rank's scores, with equally many forwards."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from refine_titan.benchmarks.samples import Sample, TaskSamples
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.evaluation import shared_scores
from refine_titan.evaluation.answering import Answer
from refine_titan.evaluation.periodic import mean_scores
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt
from refine_titan.evaluation.shared_scores import SharedScores
from refine_titan.evaluation.work import plan_work
from refine_titan.validation import load_config
from tests.integration_tests.vllm_engines import random_model, small_args


class CountedModel:
    """A model that counts its forwards."""

    def __init__(self, model):
        self.model, self.forwards = model, 0

    def __call__(self, *args, **kwargs):
        self.forwards += 1
        return self.model(*args, **kwargs)


@pytest.fixture(scope="module")
def model():
    return random_model(replace(small_args("delta_net"), vocab_size=264))


@pytest.fixture(scope="module")
def shared() -> SharedScores:
    """Five batches of at most three prompts, two of them with two stop strings, and four documents."""
    config = load_config(
        ["--evaluation.stop_at_newline", "--evaluation.batch_size", "3", "--training.seq_len", "128", "--refine.num_chunks", "2"]
    )
    questions = [Sample("longbench", "hotpotqa", i, f"{i} why? " * (i + 1), ("e", "t"), 3 + i) for i in range(8)]
    sums = [Sample("longbench", "passage_count", i, f"{i} how many? " * (i + 1), ("1",), 2) for i in range(5)]
    documents = [Sample("perplexity", "perplexity", i, f"document {i} " * 20, (), 0, 64) for i in range(4)]
    tasks = [TaskSamples(name, s, {}) for name, s in (("questions", questions), ("sums", sums), ("documents", documents))]
    protocol = AnswerProtocol.from_settings(config.evaluation, 128, (256,))
    return SharedScores(plan_work(tasks, protocol, ByteTokenizer()), protocol, ByteTokenizer(), config.evaluation)


def fingerprint(prompt: Prompt, answer: Answer) -> dict[str, float]:
    """A score that depends on every token of an answer."""
    return {"score": float(hash(answer.completion.tokens) % 997)}


@pytest.mark.parametrize("num_ranks", [2, 3, 12])
def test_shares_add_up_to_the_scores_of_one_rank_and_take_equally_many_forwards(model, shared, monkeypatch, num_ranks):
    monkeypatch.setattr(shared_scores, "answer_line", fingerprint)  # the metrics of random answers are all 0
    whole = shared.of_rank(model, 264, torch.device("cpu"), nullcontext)
    models = [CountedModel(model) for _ in range(num_ranks)]
    shares = [shared.of_rank(m, 264, torch.device("cpu"), nullcontext, r, num_ranks, ends_early=False) for r, m in enumerate(models)]
    assert whole.shape == (17, 2) and len(set(whole[:, 0].tolist())) > 8
    assert not whole[:-4, 1].any() and 0 <= whole[-4:, 1].max() <= 1
    assert torch.equal(sum(shares), whole)
    assert len({counted.forwards for counted in models}) == 1
    means = mean_scores(shared.samples, sum(shares).tolist())
    assert means == mean_scores(shared.samples, whole.tolist())
    tasks = ["accuracy", "longbench/hotpotqa", "longbench/passage_count", "loss", "perplexity"]
    assert list(means) == [f"validation_metrics/{name}" for name in tasks]
    assert means["validation_metrics/loss"] == sum(whole[-4:, 0].tolist()) / 4
    assert means["validation_metrics/accuracy"] == sum(whole[-4:, 1].tolist()) / 4
    assert means["validation_metrics/perplexity"] == math.exp(means["validation_metrics/loss"])


def test_forwards_are_counted_before_they_are_made(model, shared):
    counted = CountedModel(model)
    shared.of_rank(counted, 264, torch.device("cpu"), nullcontext, ends_early=False)
    engine = shared_scores.NativeCompletionEngine(model, 264, torch.device("cpu"), width=3)
    assert counted.forwards == sum(shared._forwards(item, engine) for item in shared._items)
