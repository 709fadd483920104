"""Preparation of prompts for an engine: protocol, limit, cut, batches."""

import random
from array import array

import pytest

from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, score
from refine_titan.benchmarks.samples import Sample
from refine_titan.config.sections import Evaluation
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.answering import answer_seed
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt, batches, prepare_prompt, scored_by_first_line

TOKENIZER = ByteTokenizer()


def sample(prompt: str = "ab", index: int = 0, length: int | None = None, max_new_tokens: int = 8, task: str = "hotpotqa") -> Sample:
    return Sample("longbench", task, index, prompt, ("x",), max_new_tokens, length)


def test_limit_is_what_the_answer_leaves():
    default = AnswerProtocol.from_settings(Evaluation(), 100, ())
    assert (default.temperature, default.top_k, default.cut) == (0.0, 0, "middle")
    assert default.prompt_limit(sample()) == 92
    assert default.prompt_limit(sample(length=256)) == 248  # the sample was made for more tokens than training.seq_len
    assert AnswerProtocol.from_settings(Evaluation(max_prompt_tokens=30), 100, ()).prompt_limit(sample()) == 30
    reference = AnswerProtocol.from_settings(Evaluation(protocol="reference"), 100, ())
    assert (reference.temperature, reference.top_k, reference.cut) == (1.0, 50, "right")
    assert AnswerProtocol.from_settings(Evaluation(protocol="reference", cut="middle"), 100, ()).cut == "middle"


def test_long_prompt_is_cut_and_counted():
    prompt = prepare_prompt(sample("0123456789" * 2), AnswerProtocol.from_settings(Evaluation(max_prompt_tokens=10), 100, ()), TOKENIZER)
    assert bytes(prompt.tokens.tolist()) == b"0123456789" and prompt.cut_tokens == 10
    whole = prepare_prompt(sample("0123"), AnswerProtocol.from_settings(Evaluation(max_prompt_tokens=10), 100, ()), TOKENIZER)
    assert bytes(whole.tokens.tolist()) == b"0123" and whole.cut_tokens == 0
    with pytest.raises(UserError, match=r"longbench/gov_report asks for answers of 512 tokens.*training.seq_len = 512"):
        prepare_prompt(sample(max_new_tokens=512, task="gov_report"), AnswerProtocol.from_settings(Evaluation(), 512, ()), TOKENIZER)


def test_batches_do_not_depend_on_the_order_of_the_samples():
    prompts = [Prompt(sample(index=i), array("i", [0] * (1 + i % 7)), 0) for i in range(23)]
    expected = [[p.sample.index for p in batch] for batch in batches(prompts, 4)]
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert [[p.sample.index for p in batch] for batch in batches(shuffled, 4)] == expected
    lengths = [1 + i % 7 for batch in expected for i in batch]
    assert lengths == sorted(lengths, reverse=True) and [len(batch) for batch in expected] == [4] * 5 + [3]


def test_seed_of_an_answer_depends_on_seed_and_sample():
    seeds = {answer_seed(seed, sample(index=i, length=n)) for seed in (0, 1) for i in (0, 1) for n in (None, 4096)}
    assert len(seeds) == 8


@pytest.mark.parametrize("task", list(LONGBENCH_METRICS))
def test_stopping_at_the_first_newline_does_not_change_a_score(task):
    """The responses include some that begin with newlines, have several lines, or are empty."""
    if not scored_by_first_line("longbench", task):
        return
    rng, words = random.Random(1), ["alpha", "beta", "the", "x1", "\n", "\n\n", " "]
    for _ in range(200):
        response = " ".join(rng.choices(words, k=rng.randint(0, 8)))
        for answers in (["alpha"], ["beta x1", "the alpha"]):
            assert score("longbench", task, response.partition("\n")[0], answers) == score("longbench", task, response, answers)


def test_only_tasks_scored_by_the_first_line_stop_at_newlines():
    stopping = AnswerProtocol.from_settings(Evaluation(stop_at_newline=True), 100, ())
    assert stopping.stop_strings(sample(task="hotpotqa")) == ("\n",)
    # The metrics of the first three skip newlines at an answer's beginning; the others read the whole answer.
    for task in ("trec", "triviaqa", "samsum", "gov_report", "lcc"):
        assert stopping.stop_strings(sample(task=task)) == ()
    assert stopping.stop_strings(Sample("ruler_qa", "ruler_squadqa", 0, "p", ("x",), 32)) == ()
    assert AnswerProtocol.from_settings(Evaluation(), 100, ()).stop_strings(sample(task="hotpotqa")) == ()
