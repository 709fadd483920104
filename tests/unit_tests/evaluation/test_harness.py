"""Results of lm-evaluation-harness on local tasks of its own kinds agree with those of plain forwards."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra harness")

import lm_eval
import yaml
from lm_eval.api.instance import Instance

from refine_titan.errors import UserError
from refine_titan.evaluation import harness
from refine_titan.evaluation.harness import (
    Continuation,
    RefineTitanLM,
    evaluate_harness_tasks,
    likelihoods,
    load_harness_tasks,
    write_tokenizer,
)
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
    with pytest.raises(UserError, match="ask for num_beams = 3; allowed: until.*, num_beams = 1"):
        lm.generate_until(instances("generate_until", ("a", {"until": [], "num_beams": 3})))


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"top_p": 0.95},  # nothing is sampled
        {"top_p": 1.0, "do_sample": True, "temperature": 0.5},
        {"num_beams": 1, "repetition_penalty": 1.0, "temperature": 1, "do_sample": False},
    ],
)
def test_options_that_change_nothing_are_accepted(lm, options):
    asked = {"until": [], "max_gen_toks": 4}
    own = {key: value for key, value in options.items() if key in ("do_sample", "temperature")}
    found, expected = (lm.generate_until(instances("generate_until", ("abc", asked | extra))) for extra in (options, own))
    assert found == expected


@pytest.mark.parametrize("options", [{"top_p": 0.9, "do_sample": True, "temperature": 1.0}, {"repetition_penalty": 1.2}, {"stop": "x"}])
def test_options_that_no_engine_has_are_refused(lm, options):
    with pytest.raises(UserError, match=f"ask for {next(iter(options))} = "):
        lm.generate_until(instances("generate_until", ("abc", {"until": []} | options)))


@pytest.mark.slow  # the harness reads the thousands of tasks that it knows
def test_tasks_of_the_harness_run_on_local_data(inference, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for path in TASKS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text().replace("QUESTIONS", str(tmp_path / "questions.jsonl")))
    tasks = ["local_choice", "local_words", "local_text"]
    loaded = load_harness_tasks(tasks, inference.tokenizer, include_path=tmp_path)
    found = evaluate_harness_tasks(inference, engine, loaded, batch_size=2)
    scores = [[plain_logprob(inference, q["question"], choice)[0] for choice in q["choices"]] for q in QUESTIONS]
    right = [row.index(max(row)) == q["label"] for row, q in zip(scores, QUESTIONS)]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert found["results"]["local_words"]["exact_match,none"] == 0.0  # random weights
    lm = RefineTitanLM(inference, engine, batch_size=2)
    total = sum(lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((q["question"],) for q in QUESTIONS))))
    num_bytes = sum(len(q["question"].encode()) for q in QUESTIONS)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        load_harness_tasks(["no_such_task"], inference.tokenizer, include_path=tmp_path)
    path = tmp_path / "local_words.yaml"
    path.write_text(path.read_text() + "generation_kwargs:\n  do_sample: true\n  temperature: 1.0\n  top_p: 0.5\n")
    with pytest.raises(UserError, match="--tasks: local_words: the task's generation_kwargs ask for top_p = 0.5"):
        load_harness_tasks(["local_words"], inference.tokenizer, include_path=tmp_path)


@pytest.mark.slow
def test_ruler_of_the_harness_runs_and_takes_metadata(inference, engine, monkeypatch):
    pytest.importorskip("wonderwords", reason="ruler needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer, first = inference.tokenizer, []
    for _ in range(2):
        loaded = load_harness_tasks(["niah_single_1"], tokenizer, metadata={"max_seq_lengths": [1024, 1536]}, seed=3)
        documents = list(loaded.tasks[0].test_docs())
        assert len(documents) == 1000 and {document["max_length"] for document in documents} == {1024, 1536}
        assert max(len(tokenizer.encode(document["input"])) for document in documents) <= 1536
        first.append(documents[0]["input"])
    assert first[0] == first[1]  # the seed decides
    found = evaluate_harness_tasks(inference, engine, loaded, limit=1)
    assert found["results"]["niah_single_1"]["1024,none"] == 0.0 and found["n-samples"]["niah_single_1"]["effective"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task, package", [("longbench", "jieba"), ("longbench_hotpotqa", "jieba"), ("ruler", "wonderwords")])
def test_a_missing_package_is_named_before_anything_is_loaded(inference, monkeypatch, task, package):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.") and ("longbench" in name or "ruler" in name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--tasks: {task} needs the package '{package}', which is not installed"):
        load_harness_tasks([task], inference.tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_harness_measures_with_the_tokens_of_the_run(inference, hf_tokenizer, tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = hf_tokenizer if kind == "bpe" else inference.tokenizer
    write_tokenizer(tokenizer, tmp_path)
    text = "The naïve fox 漢字 jumps.\n"
    found = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False).input_ids
    assert len(found) == len(tokenizer.encode(text)) and (kind == "bytes" or found == tokenizer.encode(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_tokenizer_without_end_of_sequence_is_refused(inference, engine):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        RefineTitanLM(replace(inference, stop_tokens=()), engine, 2)


@pytest.mark.parametrize("folder", ["ruler", "longbench"])
def test_generation_of_every_task_for_long_texts_is_accepted(folder):
    """The options of each task's file, without its data."""
    read = 0
    for path in sorted(Path(lm_eval.__file__).parent.glob(f"tasks/{folder}/*")):
        text = path.read_text() if path.suffix in ("", ".yaml") and path.is_file() else ""
        block = re.search(r"^generation_kwargs:\n((?:[ ]+.*\n)+)", text, re.MULTILINE)
        if block:
            harness._generation_options(yaml.safe_load(block.group(1)))
            read += 1
    assert read >= {"ruler": 5, "longbench": 30}[folder]
