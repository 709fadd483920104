"""Tables for papers and programs: LaTeX that compiles, CSV with all digits, SVG files that need nothing else."""

import csv
import io
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from refine_titan.report.escaping import csv_text, json_data, latex_text
from refine_titan.report.result_charts import result_charts
from refine_titan.report.result_tables import results_csv, results_latex
from refine_titan.report.results import aggregate
from refine_titan.report.svg_files import write_svg_files
from tests.evaluation_runs import HOSTILE, paper_tasks, run_record, sample_lines

# Every character that means something to LaTeX.
LATEX = r"\input{x} % $a_b^c$ {&} #1 ~ <|> ± – … é"


@pytest.fixture(scope="module")
def runs():
    """The results of two runs of every task."""
    names = (f"{LATEX} {HOSTILE[2]}", '=HYPERLINK("http://x")')
    samples = [sample_lines(paper_tasks(8), seed=seed) for seed in (1, 2)]
    return [aggregate(run_record(name), lines) for name, lines in zip(names, samples)]


def test_latex_is_text_with_booktabs(runs):
    text = results_latex(runs)
    assert text.count(r"\begin{table}") == text.count(r"\toprule") == text.count(r"\bottomrule") == 5
    assert r"\textbackslash{}input\{x\} \% \$a\_b\textasciicircum{}c\$ \{\&\} \#1 \textasciitilde{}" in text
    # A table with many columns has a row for each of them instead.
    assert r"\begin{tabular}{lrr}" in text and "\nS-NIAH 4K & " in text and r"\begin{tabular}{llrrr}" in text
    assert latex_text("a\x1b[2J\nb\\") == r"a [2J b\textbackslash{}"


def test_latex_compiles(runs, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex")
    (tmp_path / "results.tex").write_text(results_latex(runs))
    page = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{results.tex}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert result.returncode == 0 and b"Overfull" not in result.stdout, result.stdout[-2000:]
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_csv_has_every_number_with_all_digits_and_no_formula(runs):
    lines = list(csv.DictReader(io.StringIO(results_csv(runs))))
    expected = sum(len(row["metrics"]) for run in runs for row in run["tasks"])
    expected += sum(len(group["by_length"]) + 1 for run in runs for group in run["averages"].values())
    assert len(lines) == expected and {line["run"] for line in lines} == {csv_text(run["name"]) for run in runs}
    assert lines[-1]["run"] == '\'=HYPERLINK("http://x")'
    row = runs[0]["tasks"][0]
    assert float(lines[0]["value"]) == row["score"] and float(lines[0]["ci95_low"]) == row["ci95"][0]
    assert lines[0]["length"] == "4096" and int(lines[0]["num_samples"]) == 8


def test_svg_files_stand_alone(runs, tmp_path):
    charts = result_charts(runs)
    files = write_svg_files(tmp_path / "charts", charts)
    assert len(files) == len(set(files)) == len(charts) > 8
    for file in files:
        text = file.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in text and "url(" not in text
        # The legend names both runs.
        shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert runs[1]["name"] in shown and sum((name or "").startswith("\\input") for name in shown) >= 1
    assert {file.name for file in write_svg_files(tmp_path / "twice", [charts[0], charts[0]])} == {
        "ruler-score-by-task.svg",
        "ruler-score-by-task-2.svg",
    }


def test_json_in_a_page_cannot_end_its_element():
    text = json_data({"a": ["</script><!--", "\u2028"], "b": float("nan")})
    assert b"<" not in text and b'"b":null' in text and json.loads(text)["a"] == ["</script><!--", "\u2028"]
