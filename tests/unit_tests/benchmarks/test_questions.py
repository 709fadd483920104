"""Questions in a user's own file, and LongBench's files as their authors publish them."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from refine_titan.benchmarks.longbench_prompts import TEMPLATES
from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, TREC_CLASSES, score
from refine_titan.benchmarks.question_metrics import METRICS, find_metric
from refine_titan.benchmarks.response_files import score_file
from refine_titan.benchmarks.tasks import load_samples
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import ExtensionError, UserError
from refine_titan.train import answer_scorer
from refine_titan.validation import load_config
from tests.packages import write_package


def load(path: Path, rows: list[dict], **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples(str(path), tokenizer=ByteTokenizer(), **settings)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Who?"}, "Who?"),
        ({"input": "Who?"}, "Who?"),
        ({"question": "Who?"}, "Who?"),
        ({"context": "Ada wrote it. Who? A:"}, "Ada wrote it. Who? A:"),
        ({"context": "Ada wrote it.", "question": "Who?"}, "Ada wrote it.\n\nWho?"),
        ({"question": "Who?", "context": "Ada wrote it.", "prompt": "Q"}, "Q"),
    ],
)
def test_a_file_of_any_name_is_a_task(tmp_path, row, prompt):
    found = load(tmp_path / "my own.questions.jsonl", [row | {"answers": ["Ada"]}])
    [sample] = found.samples
    assert (sample.benchmark, sample.task, sample.prompt, sample.answers) == ("questions", "my_own_questions", prompt, ("Ada",))
    assert (sample.metric, sample.max_new_tokens) == ("contains", 64)
    assert found.notes == ("my_own_questions is scored by contains (evaluation.metric)",)


def test_rows_name_tasks_of_their_own(tmp_path):
    rows = [{"question": "Who?", "answer": "Ada", "task": task, "max_new_tokens": 5} for task in ("history", "a/b|c")]
    found = load(tmp_path / "rows.jsonl", rows, metric="f1")
    assert [(s.task, s.metric, s.max_new_tokens) for s in found.samples] == [("history", "f1", 5), ("a_b_c", "f1", 5)]
    assert len(found.notes) == 2


def test_rows_without_a_question_are_counted(tmp_path):
    rows = [{"context": "c", "question": None, "answer": "a"}, {"context": 3, "question": "q", "answer": "a"}]
    found = load(tmp_path / "rows.jsonl", [*rows, {"context": "c", "question": "q", "answer": "a"}])
    assert len(found.samples) == 1 and found.skipped == {"null prompt": 1, "not text (int) prompt": 1}


@pytest.mark.parametrize(
    ("metric", "response", "answers", "expected"),
    [
        ("contains", "It was ADA.\nAnd more", ("ada", "Bob"), 1.0),
        ("contains", "It was Eve", ("ada", "Bob"), 0.0),
        ("exact_match", "\n Ada \nQuestion:", ("ada",), 1.0),
        ("exact_match", "Ada L.", ("ada",), 0.0),
        ("exact_match", "3.14", ("31.4",), 0.0),
        ("f1", "the brown fox\nmore", ("A quick brown fox", "cat"), 0.8),
        ("rouge_l", "A cat sat", ("a cat sat down", "none"), 2 * 3 / (3 + 4)),
    ],
)
def test_metrics(metric, response, answers, expected):
    assert find_metric(metric)(response, answers) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_odd_responses_are_numbers_from_0_to_1(metric):
    for response in ("", "\n\n", " . ", "\0", "ß" * 2000):
        assert 0 <= find_metric(metric)(response, ("a", " b ", "?")) <= 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    code = "def half(response, answers):\n    return 0.5 if response in answers else 0\n\ndef wrong(response, answers):\n    return 'a'\n"
    code += "\ndef crashes(response, answers):\n    return 1 / 0\n"
    write_package(tmp_path, "my_metrics", code, metrics={"half": "half", "wrong": "wrong", "crashes": "crashes", "f1": "half"})
    monkeypatch.syspath_prepend(tmp_path)
    find_metric.cache_clear()
    yield
    find_metric.cache_clear()
    sys.modules.pop("my_metrics", None)


def test_a_metric_of_an_installed_package(package, tmp_path):
    assert find_metric("half")("Ada", ("Ada",)) == 0.5
    found = load(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "a"}], metric="half")
    assert found.samples[0].metric == "half"
    with pytest.raises(ExtensionError, match="'wrong' of package my_metrics 1.0 returned 'a' for 'Ada'; wanted is a number from 0 to 1"):
        find_metric("wrong")("Ada", ("Ada",))
    with pytest.raises(ExtensionError, match="'crashes' .* failed in line 8 of .* ZeroDivisionError"):
        find_metric("crashes")("Ada", ("Ada",))
    with pytest.raises(UserError, match="evaluation.metric is 'f1', a name that is given by refine_titan itself and by package my_metrics"):
        find_metric("f1")


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(UserError, match=r"evaluation.metric is 'contain'; allowed: 'contains'.*did you mean 'contains'"):
        load(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "a"}], metric="contain")


def test_responses_to_questions_are_scored(tmp_path):
    path = tmp_path / "responses.jsonl"
    row = {"benchmark": "questions", "task": "mine", "response": "It was Ada", "answers": ["ada"]}
    path.write_text("".join(json.dumps(row | more) + "\n" for more in ({}, {"metric": "exact_match"})))
    assert [line["score"] for line in score_file(path)] == [1.0, 0.0]


def test_post_training_rewards_answers_by_the_same_metrics():
    def scorer(task: str):
        return answer_scorer(load_config(["--refine.phase", "posttrain", "--posttrain.outer", "reward", "--posttrain.task", task]))

    assert scorer("questions/contains")("It was Ada", ["ada"]) == 1.0
    assert scorer("questions/exact_match")("It was Ada", ["ada"]) == 0.0
    with pytest.raises(UserError, match="posttrain.task is 'contain'; allowed: 'contains'"):
        scorer("questions/contain")


# LongBench as it is published: texts apart from questions, prompts in a file of the authors' repository.


def test_the_templates_are_the_published_ones():
    """The digest is of the published file's English and code tasks."""
    digest = hashlib.sha256(json.dumps(TEMPLATES, sort_keys=True).encode()).hexdigest()
    assert digest == "1a91047176a71d1a714ab3c3a690cfec75d24e6448f39e0eed4667aa76552400"
    assert set(TEMPLATES) == set(LONGBENCH_METRICS)


def published(task: str, **fields) -> dict:
    row = {"input": "Which {one}?", "context": "A {context} of {input}.", "answers": ["This"], "length": 9000, "dataset": task}
    return row | {"language": "en", "all_classes": None, "_id": "0123"} | fields


@pytest.mark.parametrize("task", LONGBENCH_METRICS)
def test_published_rows_get_the_prompt_of_their_task(tmp_path, task):
    [sample] = load(tmp_path / f"{task}.jsonl", [published(task)]).samples
    before, _, after = TEMPLATES[task].partition("{context}")
    assert sample.prompt == before + "A {context} of {input}." + after.replace("{input}", "Which {one}?")
    assert (sample.benchmark, sample.task, sample.length, sample.metric, sample.classes) == ("longbench", task, None, "", ())


def test_published_rows_without_a_question(tmp_path):
    """Summaries have an empty `input`; a question that is null leaves its row out."""
    [sample] = load(tmp_path / "gov_report.jsonl", [published("gov_report", input="")]).samples
    assert sample.prompt.startswith("You are given a report") and "A {context} of {input}." in sample.prompt
    found = load(tmp_path / "qasper.jsonl", [published("qasper", input=None), published("qasper")])
    assert len(found.samples) == 1 and found.skipped == {"null prompt": 1}


def test_classes_of_the_file_are_those_that_count(tmp_path):
    classes = ["food", "Fast food", "Sport"]
    [sample] = load(tmp_path / "trec.jsonl", [published("trec", all_classes=classes, answers=["Fast food"])]).samples
    assert sample.classes == tuple(classes)
    assert score("longbench", "trec", "Fast food", ["Fast food"], classes) == {"class_match": 1.0}
    assert score("longbench", "trec", "Fast food, Sport", ["Fast food"], classes) == {"class_match": 0.5}
    assert "Fast food" not in TREC_CLASSES
