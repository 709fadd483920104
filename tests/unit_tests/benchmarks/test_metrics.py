"""Scores equal the golden ones, through the command line too; malformed lines give one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, TREC_CLASSES, score
from refine_titan.benchmarks.response_files import score_file
from refine_titan.commands import evaluate
from refine_titan.errors import UserError

ROOT = Path(__file__).parents[3]
LINE = {"benchmark": "longbench", "task": "hotpotqa", "response": "Paris", "answers": ["Paris"]}


def run_score(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/evaluate.py", "score", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def main_metric(benchmark: str, task: str, response: str, answers: list[str]) -> float:
    return next(iter(score(benchmark, task, response, answers).values()))


def test_all_golden_scores_through_the_command_line(oracles, tmp_path):
    golden = [json.loads(line) for line in (oracles / "scorers.jsonl").read_text(encoding="utf-8").splitlines()]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "score"}) + "\n" for line in golden))

    result = run_score(file)

    assert result.returncode == 0, result.stderr
    scored = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(scored) == len(golden) == 772
    for found, wanted in zip(scored, golden):
        assert list(found) == list(wanted)
        assert found["score"] == pytest.approx(wanted.pop("score"), abs=1e-6), found
        assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "line 1: the line is empty"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        (json.dumps({"task": "vt", "text": "x"}), "line 1: no benchmark, response, answers; keys found: task, text"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE | {"answers": "a"}), "line 2: answers must be a list of strings, found 'a'"),
        (json.dumps(LINE | {"answers": []}), "line 1: longbench/hotpotqa: no answers"),
        (json.dumps(LINE | {"answers": [3]}), "line 1: longbench/hotpotqa: not text (int) answer; found [3]"),
        (json.dumps(LINE | {"response": None}), "line 1: response must be a string, found None"),
        (json.dumps(LINE | {"task": "hotpotqs"}), "did you mean 'hotpotqa'?; known: narrativeqa, "),
        (json.dumps(LINE | {"benchmark": "longbnch"}), "did you mean 'longbench'?; known: ruler, ruler_qa, longbench"),
        (json.dumps(LINE | {"benchmark": "ruler"}), "known: niah_single_1, "),
        (json.dumps(LINE | {"benchmark": "ruler_qa"}), "allowed: names like ruler_squadqa"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    file = tmp_path / "responses.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        list(score_file(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_the_command_ends_with_one_line_and_writes_no_part_of_the_result(tmp_path, capsys):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(LINE) + "\n{}\n")
    assert evaluate.main(["score", str(file)]) == 1
    message = f"error: {file}, line 2: no benchmark, task, response, answers; keys found: none\n"
    assert capsys.readouterr() == ("", message)


def test_every_character_survives_scoring(tmp_path, capfdbinary):
    file = tmp_path / "responses.jsonl"
    lines = [LINE | {"response": "日本\u2028é"}, LINE | {"response": "\ud800"}, LINE | {"extra": {"b": [1.5, None]}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.main(["score", str(file)]) == 0
    output = capfdbinary.readouterr().out
    scored = [json.loads(line) for line in output.split(b"\n") if line]
    assert scored == [line | {"score": s} for line, s in zip(lines, [0.0, 0.0, 1.0])]
    assert "日本".encode() in output


def test_a_missing_file_is_named(capsys):
    assert evaluate.main(["score", "nowhere.jsonl"]) == 1
    assert capsys.readouterr().err == "error: nowhere.jsonl cannot be read: No such file or directory\n"


def test_ruler_qa_reports_both_metrics():
    assert score("ruler_qa", "ruler_squadqa", "in Rome", ["Rome", "Roma"]) == {"any_reference": 1.0, "reference_fraction": 0.5}
    assert score("ruler_qa", "qa_1", "no\nRome", ["Rome"]) == {"any_reference": 0.0, "reference_fraction": 1.0}


def test_ruler_counts_the_references_found():
    assert score("ruler", "vt", "ABCDE, fghij", ["ABCDE", "FGHIJ", "XXXXX", "YYYYY"]) == {
        "reference_fraction": 0.5,
        "all_references": 0.0,
    }
    assert score("ruler", "cwe", "B a", ["a", "b"]) == {"reference_fraction": 1.0, "all_references": 1.0}


def test_blank_references_cannot_be_found_by_saying_nothing():
    assert score("ruler", "vt", "", ["ABCDE", " "])["reference_fraction"] == 0.0
    with pytest.raises(UserError, match="every answer is blank"):
        score("ruler", "vt", "", ["", " "])


def test_rouge_of_hundreds_of_words_without_a_full_stop():
    """The package alone ends in a RecursionError on such texts."""
    response, answer = (" ".join(f"{letter}{i}" for i in range(600)) + " end" for letter in "xy")
    limit = sys.getrecursionlimit()
    assert main_metric("longbench", "gov_report", response, [answer]) == pytest.approx(1 / 601, abs=1e-6)
    assert sys.getrecursionlimit() == limit <= 1200


@pytest.mark.parametrize("response", ["", " ", "...", "\n"])
def test_rouge_of_no_words_is_zero(response):
    assert main_metric("longbench", "qmsum", response, ["A summary."]) == 0.0
    assert main_metric("longbench", "qmsum", "A summary.", [response or "."]) == 0.0


def test_trec_has_fifty_classes_each_of_which_is_right_alone():
    assert len(set(TREC_CLASSES)) == 50
    for name in TREC_CLASSES:
        assert main_metric("longbench", "trec", f"\n{name}\nQuestion: x\nType: Date", [name]) == 1.0


def test_code_is_the_first_line_that_is_no_comment():
    response = "\n```python\n# sum\nreturn a + b\nreturn c"
    assert main_metric("longbench", "lcc", response, ["return a + b"]) == 1.0


def test_retrieved_paragraphs_are_numbers():
    assert main_metric("longbench", "passage_retrieval_en", "Paragraph 7 or 8", ["Paragraph 7"]) == 0.5
    assert main_metric("longbench", "passage_count", "none", ["7"]) == 0.0


@pytest.mark.parametrize("task", LONGBENCH_METRICS)
def test_an_unrelated_response_scores_zero_on_every_longbench_task(task):
    answer = {"passage_count": "12", "passage_retrieval_en": "Paragraph 12", "trec": "Date"}.get(task, "zebra zoo")
    assert main_metric("longbench", task, "qqqq", [answer]) == 0.0
