"""Comparison of two runs sample by sample, as a library and by the command line."""

import csv
import io
import json
from pathlib import Path

import pytest

from refine_titan.commands.main import main
from refine_titan.errors import UserError
from refine_titan.report.comparison import compare
from refine_titan.report.comparison_report import csv_report, headlines, html_report, latex_report, markdown_report, text_report
from refine_titan.report.results import write_results
from refine_titan.report.statistics import holm_adjusted
from tests.evaluation_runs import paper_tasks, run_record, sample_lines, write_run
from tests.training_runs import write_training_run
from tests.unit_tests.report.test_report import Page

TASKS = {
    ("ruler", "vt", 4096): (60, 0.2),
    ("longbench", "hotpotqa", None): (60, 0.3),
    ("perplexity", "perplexity", 2048): (20, 0.0),
}


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs of different weights on the same samples; the second one scores better."""
    first = write_run(tmp_path / "ntp", sample_lines(TASKS, seed=1))
    return first, write_run(tmp_path / "refine", sample_lines(TASKS, seed=2, skill=0.35))


def test_differences_are_second_minus_first_over_the_same_samples(runs):
    found = compare(*runs)
    assert [(row.name, row.length, row.test.num_pairs, row.unit) for row in found.tasks] == [
        ("vt", 4096, 60, "%"),
        ("hotpotqa", None, 60, "%"),
        ("perplexity", 2048, 20, "nats"),
    ]
    scores = [write_results(folder)["tasks"] for folder in runs]
    for row, first, second in zip(found.tasks, *scores):
        if row.unit == "%":
            assert (row.test.first, row.test.second) == pytest.approx((first["score"], second["score"]))
        assert row.test.difference == pytest.approx(row.test.second - row.test.first)
        assert row.test.interval[0] <= row.test.difference <= row.test.interval[1]
    assert [row.holm_p for row in found.tasks] == holm_adjusted([row.test.p_value for row in found.tasks])
    assert found.tasks[0].test.difference > 0.1
    assert found.tasks[2].test.difference == pytest.approx(-0.35, abs=0.05) and found.tasks[2].holm_p < 0.001
    assert found.warnings == [] and found.unmatched == {}
    assert found.remarks[0].startswith("checkpoint differs: outputs/ntp/")
    reverse = compare(*reversed(runs))
    assert [row.test.difference for row in reverse.tasks] == pytest.approx([-row.test.difference for row in found.tasks])
    assert [row.test.p_value for row in reverse.tasks] == [row.test.p_value for row in found.tasks]


def test_run_against_itself_differs_nowhere(runs):
    found = compare(runs[0], runs[0])
    assert {(row.test.difference, row.test.p_value, row.holm_p) for row in found.tasks} == {(0.0, 1.0, 1.0)}
    assert found.remarks == [] and found.runs[0].label != found.runs[1].label


def test_averages_weigh_tasks_equally(tmp_path):
    tasks = {("longbench", "hotpotqa", None): (10, 0.2), ("longbench", "trec", None): (90, 0.9)}
    folders = [write_run(tmp_path / str(seed), sample_lines(tasks, seed=seed)) for seed in (1, 2)]
    found = compare(*folders)
    (average,) = found.averages
    assert average.name == "LongBench, mean of 2" and average.test.num_pairs == 100
    assert average.test.difference == pytest.approx(sum(row.test.difference for row in found.tasks) / 2)


def test_samples_without_a_partner_or_with_another_prompt_are_counted_and_left_out(runs):
    lines = sample_lines(TASKS, seed=2)
    vt = [line for line in lines if line["task"] == "vt"]
    vt[0]["prompt_sha256"] = vt[1]["prompt_sha256"] = "0" * 64
    kept = vt[:50] + [vt[55] | {"index": 1000}, vt[56] | {"length": 8192}]
    second = write_run(runs[1].parent / "other", kept)
    found = compare(runs[0], second)
    assert found.tasks[0].test.num_pairs == 48 and len(found.tasks) == 1
    assert found.unmatched == {"only in the first": 10 + 60 + 20, "with different prompts": 2, "only in the second": 2}
    counts = "90 only in the first, 2 with different prompts, 2 only in the second"
    assert f"48 samples compared; left out: {counts}." in text_report(found)


def test_runs_that_measured_differently_are_warned_of(runs):
    protocol = run_record()["protocol"] | {"greedy": False, "top_k": 50}
    other = write_run(
        runs[0].parent / "other",
        sample_lines(TASKS, seed=3),
        protocol=protocol,
        seed=8,
        tokenizer_sha256="x",
        haystack="essays",
        phase={"test_time_training": {"carry_over": True}},
    )
    warnings = "\n".join(compare(runs[0], other).warnings)
    for text in (
        "protocol.greedy differs: True and False",
        "protocol.top_k differs: not set and 50",
        "seed differs: 7 and 8",
        "tokenizer_sha256 differs",
        "haystack differs: built-in substitute for essays and essays",
        "other carries weights over",
    ):
        assert text in warnings
    assert "test_time_training" not in warnings


def test_what_models_of_one_family_compute_is_compared(tmp_path):
    models = {
        "old": {"name": "lact", "flavor": "debug"},  # as earlier versions recorded it
        "a": {"name": "lact", "flavor": "debug", "args": {"chunk_size": 2048, "dim": 256}},
        "b": {"name": "lact", "flavor": "debug", "args": {"chunk_size": 1024, "dim": 256}},
        "c": {"name": "delta_net", "flavor": "debug", "args": {"n_heads": 4}},
    }
    lines = sample_lines({("ruler", "vt", 4096): (8, 0.2)})
    folders = {name: write_run(tmp_path / name, lines, model=model) for name, model in models.items()}
    write_run(folders["b"], lines, model=models["b"], engine_dtype="float32")

    def found(first: str, second: str) -> list[str]:
        return [line for line in compare(folders[first], folders[second]).remarks if line.startswith(("model", "engine"))]

    assert found("a", "b") == ["model.args.chunk_size differs: 2048 and 1024", "engine_dtype differs: not set and float32"]
    assert found("a", "c") == ["model.name differs: lact and delta_net"] and found("old", "a") == found("a", "a") == []


def test_metrics_that_differ_are_warned_of(runs):
    lines = [line | {"metrics": {"rouge": line["score"]}} if line["task"] == "hotpotqa" else line for line in sample_lines(TASKS)]
    (warning,) = compare(runs[0], write_run(runs[0].parent / "other", lines)).warnings
    assert warning == "longbench/hotpotqa is scored by f1 in the first and by rouge in the second"


def test_results_file_needs_its_samples(runs, tmp_path):
    write_results(runs[0])
    assert compare(runs[0] / "results.json", runs[1]).tasks == compare(*runs).tasks
    alone = tmp_path / "results.json"
    alone.write_bytes((runs[0] / "results.json").read_bytes())
    with pytest.raises(UserError, match="has no samples.jsonl beside it"):
        compare(alone, runs[1])
    with (runs[0] / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample_lines(TASKS)[0] | {"index": 99}) + "\n")
    with pytest.raises(UserError, match="does not belong to the samples.jsonl beside it"):
        compare(runs[0] / "results.json", runs[1])


def test_headline_says_the_difference_its_p_and_n(runs, tmp_path):
    score, loss = compare(*runs).overall
    assert (score.name, score.test.num_pairs, loss.name, loss.test.num_pairs) == ("mean of 2 tasks", 120, "perplexity, 2K", 20)
    assert score.test.difference == pytest.approx(sum(row.test.difference for row in compare(*runs).tasks[:2]) / 2)
    first, second = headlines(compare(*runs), "A", "B")
    points = f"{100 * score.test.difference:.1f}"
    assert first == f"B is {points} points higher than A, p 0.0002, n 120 (mean of 2 tasks)."
    assert second.startswith("B's loss is 0.3") and second.endswith(" nats a token lower than A's, p below 0.0001, n 20 (perplexity, 2K).")
    back = headlines(compare(*reversed(runs)))[0]
    assert back.startswith(f"ntp is {points} points lower than refine, p 0.0002, n 120")
    same = headlines(compare(runs[0], runs[0]))
    assert same[0].startswith("ntp (B) and ntp (A) have the same score to 0.1 points, p 1.00, n 120")
    near = write_run(tmp_path / "near", sample_lines({("longbench", "hotpotqa", None): (60, 0.3)}, seed=5))
    (sentence,) = headlines(compare(runs[0], near))
    assert sentence.endswith("n 60 (hotpotqa). A difference of this size may be chance.")
    for report in (text_report, markdown_report, html_report):
        assert "n 60 (hotpotqa)" in report(compare(runs[0], near))


def test_reports_of_a_comparison_hold_its_rows(tmp_path):
    name = "<script>|`"
    runs = [
        write_run(tmp_path / "a", sample_lines(paper_tasks(8), seed=1)),
        write_run(tmp_path / "b", sample_lines(paper_tasks(8), seed=2), name=name, seed=8),
    ]
    found = compare(*runs)
    page = Page(html_report(found))
    assert page.tags.count("script") == 1 and "img" not in page.tags and name in page.texts["th"]
    assert page.texts["h2"][:2] == ["Differences", "Differences by task"] and "Perplexity by position" in page.texts["h2"]
    rows = [line for line in markdown_report(found).splitlines() if line.startswith("| RULER niah_multivalue")]
    assert len(rows) == 3 and all(row.count("|") == 10 for row in rows)
    assert "seed differs: 7 and 8" in markdown_report(found)
    lines = list(csv.DictReader(io.StringIO(csv_report(found))))
    assert len(lines) == len(found.tasks) + len(found.averages) + 2
    assert float(lines[0]["difference"]) == found.tasks[0].test.difference and lines[0]["task"] == found.tasks[0].name
    latex = latex_report(found)
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 2 and r"\textless{}script\textgreater{}\textbar{}" in latex
    assert len(text_report(found).splitlines()) > len(found.tasks) + len(found.averages)


def test_command_lines_print_warn_write_and_refuse(runs, tmp_path, capsys):
    def call(tool, *arguments):
        try:
            status = main([tool, *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    changed = write_run(tmp_path / "changed", sample_lines(TASKS, seed=3), seed=8)
    status, out, err = call("compare", runs[0], changed, "--html", tmp_path / "out" / "c.html", "--markdown", tmp_path / "c.md")
    assert status == 0 and "RULER vt" in out and "WARNING: seed differs: 7 and 8" in err
    outputs = ("--latex", tmp_path / "c.tex", "--csv", tmp_path / "c.csv", "--svg", tmp_path / "svg")
    assert call("compare", *runs, *outputs)[0] == 0 and (tmp_path / "c.tex").is_file() and (tmp_path / "c.csv").is_file()
    assert [path.name for path in sorted((tmp_path / "svg").iterdir())][0] == "documents-of-2k-tokens.svg"
    assert (tmp_path / "out" / "c.html").is_file() and (tmp_path / "c.md").is_file()
    other = write_run(tmp_path / "other", [line | {"prompt_sha256": "0"} for line in sample_lines(TASKS)])
    (tmp_path / "foreign.json").write_text('{"results": 1}')
    for arguments, message in [
        (("compare", runs[0], other), "no sample of"),
        (("compare", runs[0], write_run(tmp_path / "empty", [])), "no sample of"),
        (("compare", runs[0], tmp_path / "typo"), "typo does not exist"),
        (("compare", tmp_path / "foreign.json", runs[0]), "is no results.json of refine_titan"),
        (("compare", runs[0], changed, "--html", tmp_path), f"{tmp_path} is a folder"),
        (("compare", runs[0], changed, "--html", tmp_path / "foreign.json" / "x"), "x cannot be written: "),
        (("report", tmp_path), "run.json does not exist; it is written by an evaluation run"),
        (("report", runs[0], "--training", tmp_path), "no folder of a training run"),
    ]:
        status, out, err = call(*arguments)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 1 and out == "" and len(errors) == 1 and message in errors[0]
    assert call("report", runs[0])[0] == 0 and (runs[0] / "report.html").is_file()
    assert call("report", *runs, "--markdown", tmp_path / "both.md")[0] == 0
    assert (tmp_path / "both.md").read_text().count("\n| refine |") == 3
    outputs = ("--latex", tmp_path / "both.tex", "--csv", tmp_path / "both.csv", "--svg", tmp_path / "charts")
    status, out, _ = call("report", *runs, *outputs)
    assert status == 0 and out.splitlines()[:2] == [str(tmp_path / "both.tex"), str(tmp_path / "both.csv")]
    assert {tmp_path / "charts" / name for name in map(str, out.splitlines()[2:])} == set((tmp_path / "charts").iterdir())
    assert {"results.tex", "results.csv", "results.md"} <= {path.name for path in runs[0].iterdir()}
    training = write_training_run(tmp_path / "training", steps=3)
    assert call("report", training) == (0, f"{training / 'report.html'}\n", "")
    status, out, _ = call("report", training, "--svg", tmp_path / "curves")
    assert status == 0 and str(tmp_path / "curves" / "next-token-loss.svg") in out.splitlines()
    for wrong in (
        runs,
        (training, runs[0], "--svg", tmp_path / "x"),
        (training, "--csv", tmp_path / "x"),
        (training, "--training", training),
    ):
        assert call("report", *wrong)[0] == 2
