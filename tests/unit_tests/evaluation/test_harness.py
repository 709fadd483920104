"""Results of lm-evaluation-harness on local tasks of its own kinds agree with those of plain forwards."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra harness")

from lm_eval.api.instance import Instance

from refine_titan.errors import UserError
from refine_titan.evaluation import harness
from refine_titan.evaluation.harness import Continuation, RefineTitanLM, evaluate_harness_tasks, likelihoods
from refine_titan.inference import Inference
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.validation import load_config

TASKS = Path(__file__).parent / "harness_tasks"
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a very long green answer", " x"], "label": 0},
    {"question": "One and one make", "choices": [" three", " two"], "label": 1},
    {"question": "Zażółć gęślą", "choices": [" jaźń", " no"], "label": 0},
]


@pytest.fixture(scope="module")
def inference():
    with Inference.from_config(load_config(["--training.mixed_precision_param", "float32"])) as inference:
        yield inference


@pytest.fixture(scope="module")
def engine(inference):
    return inference.build_engine("native", width=2, max_tokens=256)


@pytest.fixture
def lm(inference, engine):
    return RefineTitanLM(inference, engine, batch_size=2)


def plain_logprob(inference, context: str, continuation: str) -> tuple[float, bool]:
    tokens = list((context + continuation).encode())
    first = len(context.encode())
    rows = torch.arange(first - 1, len(tokens) - 1)
    with torch.no_grad():
        logits = inference.model(torch.tensor(tokens), SharedPrefixLayout((0, len(tokens))), logit_rows=rows).logits
    targets = torch.tensor(tokens[first:])
    return float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum()), torch.equal(logits.argmax(-1), targets)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def test_loglikelihoods_are_those_of_plain_forwards(inference, lm):
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    for pair, (logprob, is_greedy) in zip(pairs, found):
        expected, greedy = plain_logprob(inference, *pair)
        assert logprob == pytest.approx(expected, abs=1e-4) and is_greedy == greedy


def test_greedy_continuation_is_recognised(inference, lm):
    [text] = lm.generate_until(instances("generate_until", ("abc", {"until": [], "max_gen_toks": 4})))
    tokens = inference.tokenizer.encode("abc")
    completion = lm.engine.complete(
        harness.CompletionRequest((tuple(tokens),), (4,), (0,), stop_tokens=(256,)), inference.tokenizer.decode
    )[0]
    assert completion.text == text
    greedy = Continuation((*tokens, *completion.tokens), 4)
    other = Continuation((*tokens, *completion.tokens[:-1], (completion.tokens[-1] + 1) % 256), 4)
    [a, b] = likelihoods(inference.forward, [greedy, other], inference.device)
    assert a.is_greedy and not b.is_greedy and a.logprob > b.logprob


def test_requests_of_any_length_are_read_whole(inference, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    requests = [
        Continuation(tuple(torch.randint(0, 256, (n,), generator=generator).tolist()), scored)
        for n, scored in ((2, 1), (90, 40), (7, 3), (200, 2), (64, 63), (33, 1))
    ]
    whole = likelihoods(inference.forward, requests, inference.device)
    for read, rows in ((50, 1000), (1000, 16), (30, 7)):
        monkeypatch.setattr(harness, "READ_TOKENS", read)
        monkeypatch.setattr(harness, "LOGIT_TOKENS", rows)
        pieces = likelihoods(inference.forward, requests, inference.device)
        assert [p.is_greedy for p in pieces] == [w.is_greedy for w in whole]
        assert [p.logprob for p in pieces] == pytest.approx([w.logprob for w in whole], abs=1e-3)


def test_text_without_context_follows_end_of_sequence(inference, lm):
    [whole] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("Some text.",)))
    [(same, _)] = lm.loglikelihood(instances("loglikelihood", ("", "Some text.")))
    assert whole == pytest.approx(same, abs=1e-4)
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_generation_keeps_order_and_ends_at_until(lm):
    questions = ["a", "a much longer question", "bb", "something else", "a"]
    free = lm.generate_until(instances("generate_until", *((q, {"until": [], "max_gen_toks": 5}) for q in questions)))
    assert free[0] == free[4] and len(set(free)) > 1
    alone = [lm.generate_until(instances("generate_until", (q, {"until": [], "max_gen_toks": 5})))[0] for q in questions]
    assert alone == free
    stop = free[1][1]
    [cut] = lm.generate_until(instances("generate_until", (questions[1], {"until": [stop], "max_gen_toks": 5})))
    assert cut == free[1][: free[1].find(stop)]
    with pytest.raises(UserError, match="ask for 'num_beams'; allowed: until"):
        lm.generate_until(instances("generate_until", ("a", {"until": [], "num_beams": 3})))


@pytest.mark.slow  # the harness reads the thousands of tasks that it knows
def test_tasks_of_the_harness_run_on_local_data(inference, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for path in TASKS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text().replace("QUESTIONS", str(tmp_path / "questions.jsonl")))
    tasks = ["local_choice", "local_words", "local_text"]
    found = evaluate_harness_tasks(inference, engine, tasks, include_path=str(tmp_path), batch_size=2)
    scores = [[plain_logprob(inference, q["question"], choice)[0] for choice in q["choices"]] for q in QUESTIONS]
    right = [row.index(max(row)) == q["label"] for row, q in zip(scores, QUESTIONS)]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert found["results"]["local_words"]["exact_match,none"] == 0.0  # random weights
    lm = RefineTitanLM(inference, engine, batch_size=2)
    total = sum(lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((q["question"],) for q in QUESTIONS))))
    num_bytes = sum(len(q["question"].encode()) for q in QUESTIONS)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        evaluate_harness_tasks(inference, engine, ["no_such_task"], include_path=str(tmp_path))


def test_tokenizer_without_end_of_sequence_is_refused(inference, engine):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        RefineTitanLM(replace(inference, stop_tokens=()), engine, 2)
