"""`results.json` and the Markdown tables follow from `run.json` and `samples.jsonl`."""

import json
import math

import numpy as np
import pytest

from refine_titan.errors import UserError
from refine_titan.report.markdown import results_page
from refine_titan.report.paper_layout import length_label, percent_with_interval
from refine_titan.report.records import read_evaluation
from refine_titan.report.results import read_results, write_results
from tests.evaluation_runs import paper_tasks, run_record, sample_lines, write_run

SMALL = {
    ("ruler", "niah_single_1", 4096): (20, 0.9),
    ("ruler", "niah_single_1", 8192): (20, 0.5),
    ("ruler", "niah_multikey_1", 4096): (12, 0.4),
    ("ruler_qa", "ruler_squadqa", 4096): (10, 0.3),
    ("longbench", "hotpotqa", None): (30, 0.3),
    ("perplexity", "perplexity", 2048): (6, 0.0),
}


def rows_of(results):
    return {(row["benchmark"], row["task"], row["length"]): row for row in results["tasks"]}


def test_scores_counts_and_averages_are_those_of_the_samples(tmp_path):
    lines = sample_lines(SMALL, depths=5)
    results = write_results(write_run(tmp_path / "run", lines, skipped={"longbench/hotpotqa": {"no answers": 2}}))
    assert results == json.loads((tmp_path / "run" / "results.json").read_text()) == read_results(tmp_path / "run")
    rows = rows_of(results)
    for cell, row in rows.items():
        found = [line for line in lines if (line["benchmark"], line["task"], line["length"]) == cell]
        assert row["num_samples"] == len(found) == SMALL[cell][0]
        assert row["cut_prompts"] == sum(line["cut_tokens"] > 0 for line in found)
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        if cell[0] != "perplexity":
            assert row["score"] == pytest.approx(np.mean([line["score"] for line in found]))
            assert row["metrics"][row["metric"]] == {"mean": row["score"], "ci95": row["ci95"]}
    assert rows["longbench", "hotpotqa", None]["skipped"] == {"no answers": 2}
    assert rows["ruler_qa", "ruler_squadqa", 4096]["metrics"].keys() == {"any_reference", "reference_fraction"}
    depths = rows["ruler", "niah_single_1", 4096]["by_depth"]
    assert [cell["depth"] for cell in depths] == [0, 0.25, 0.5, 0.75, 1] and all(cell["num_samples"] == 4 for cell in depths)

    single = results["averages"]["S-NIAH"]
    scores = [rows["ruler", "niah_single_1", length]["score"] for length in (4096, 8192)]
    assert [cell["score"] for cell in single["by_length"]] == scores
    assert single["mean"]["score"] == pytest.approx(np.mean(scores)) and single["mean"]["num_samples"] == 40
    assert single["missing_tasks"] == ["niah_single_2", "niah_single_3"]
    # One task at one length: the average's interval is the task's own.
    assert single["by_length"][0]["ci95"] == rows["ruler", "niah_single_1", 4096]["ci95"]
    assert results["averages"]["LongBench"]["tasks"] == ["hotpotqa"]
    assert results["averages"].keys() == {"S-NIAH", "MK-NIAH", "NIAH", "RULER QA", "LongBench"}


def test_perplexity_weighs_documents_equally_and_is_given_by_position(tmp_path):
    lines = sample_lines({("perplexity", "perplexity", 2048): (6, 0.0)})
    # A document that ends early does not count at the last positions.
    lines[0]["positions"], lines[0]["nll_by_position"] = lines[0]["positions"][:10], lines[0]["nll_by_position"][:10]
    (row,) = write_results(write_run(tmp_path / "run", lines))["tasks"]
    assert row["score"] == pytest.approx(math.exp(np.mean([line["nll"] for line in lines])))
    assert row["metrics"]["nll"]["mean"] == pytest.approx(math.log(row["score"]))
    assert len(row["by_position"]) == 64
    assert [row["by_position"][i]["num_documents"] for i in (0, 9, 10, 63)] == [6, 6, 5, 5]
    assert row["by_position"][10]["nll"] == pytest.approx(np.mean([line["nll_by_position"][10] for line in lines[1:]]))


def test_perplexity_of_one_document_has_no_interval_and_that_of_a_diverged_model_is_finite(tmp_path):
    lines = sample_lines({("perplexity", "perplexity", 2048): (1, 0.0)})
    (row,) = write_results(write_run(tmp_path / "one", lines))["tasks"]
    assert row["ci95"] is None and row["metrics"]["nll"]["ci95"] is None
    lines[0]["nll"] = 1e6
    (row,) = write_results(write_run(tmp_path / "diverged", lines))["tasks"]
    assert math.isfinite(row["score"]) and row["score"] > 1e300


def test_order_of_lines_and_times_do_not_change_results(tmp_path):
    lines = sample_lines(SMALL)
    first = write_results(write_run(tmp_path / "a", lines, name="run"))
    shuffled = [lines[i] | {"seconds": 99.0} for i in np.random.default_rng(0).permutation(len(lines))]
    second = write_results(write_run(tmp_path / "b", shuffled, name="run"))
    for row in (*first["tasks"], *second["tasks"]):
        row.pop("seconds_per_sample")
    assert first == second
    changed = [line | {"response": "other"} if i == 3 else line for i, line in enumerate(lines)]
    assert write_results(write_run(tmp_path / "c", changed, name="run"))["samples_sha256"] != first["samples_sha256"]


def test_half_written_last_line_is_left_out_and_a_line_separator_does_not_split_a_line(tmp_path):
    lines = sample_lines({("ruler", "vt", 4096): (8, 0.5)})
    folder = write_run(tmp_path / "run", lines)
    whole = (folder / "samples.jsonl").read_bytes()
    assert b"\xe2\x80\xa8" in whole and len(read_evaluation(folder)[1]) == 8  # a line separator, not escaped
    for cut in (1, 30):
        (folder / "samples.jsonl").write_bytes(whole[:-cut])
        assert [record["index"] for record in read_evaluation(folder)[1]] == list(range(7))


def test_perfect_run_is_not_certain_and_empty_run_has_no_scores(tmp_path):
    perfect = sample_lines({("ruler", "niah_single_1", 4096): (25, 5.0)})
    results = write_results(write_run(tmp_path / "perfect", perfect))
    assert results["tasks"][0]["score"] == 1.0
    assert results["tasks"][0]["ci95"] == pytest.approx([0.05 ** (1 / 25), 1.0])
    assert "100.0 ≥88.7 (1 of 3 tasks)" in results_page([results])
    empty = write_results(write_run(tmp_path / "empty", [], tasks=["longbench/trec", "ruler"]))
    assert empty["averages"] == {} and empty["task_names"] == ["longbench/trec", "ruler"]
    assert [(row["task"], row["num_samples"], row["score"]) for row in empty["tasks"]] == [("trec", 0, None)]
    assert "No sample was finished." in results_page([empty])


def test_markdown_has_a_row_for_each_run_and_says_what_was_measured(tmp_path):
    runs = [
        write_results(write_run(tmp_path / "ntp", sample_lines(paper_tasks(6), 1))),
        write_results(
            write_run(
                tmp_path / "pipe | <b>",
                sample_lines(paper_tasks(6), 2),
                haystack="essays | from a folder",
                phase={"test_time_training": {"carry_over": True, "steps": 2}},
                skipped={"longbench": {"no answers": 4}},
            )
        ),
    ]
    page = results_page(runs)
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("| run")]
    assert all(len({line.replace("\\|", "").count("|") for line in table}) == 1 for table in tables)
    niah = tables[0]
    assert niah[0].startswith("| run | S-NIAH 4K | S-NIAH 8K | S-NIAH 16K | S-NIAH mean | MK-NIAH 4K")
    mean = runs[0]["averages"]["S-NIAH"]["mean"]
    assert niah[2].split(" | ")[4] == percent_with_interval(mean["score"], mean["ci95"])
    assert [line.split(" | ")[0] for line in niah[2:]] == ["| ntp", "| pipe \\| &lt;b>"]
    longbench = next(table for table in tables if "narrativeqa" in table[0])
    assert longbench[0].endswith("| repobench-p | average |")
    for text in (
        "CARRIED OVER",
        "test-time training: none",
        "essays \\| from a folder",
        "longbench: no answers 4",
        "ruler_squadqa 4K, any_reference",
        "ruler_squadqa 4K, reference_fraction",
    ):
        assert text in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2, holds a JSON list"),
        ('{"benchmark": "ruler", "task": "vt"}', "it lacks 'index'; found: 'benchmark', 'task'"),
        ({"score": 1.5}, "score is 1.5; allowed: numbers from 0 to 1"),
        ({"score": float("nan")}, "score is nan"),
        ({"metrics": {"x": True}}, "x is True"),
        ({"depth": 40}, "depth is 40; allowed: 0 to 1"),
        ({"length": "4K"}, "length is '4K'; allowed: an integer or null"),
        ({"index": 0}, "holds sample 0 of ruler/vt at length 4096 twice, in lines 1 and 2"),
        ({"benchmark": "perplexity", "nll_by_position": [1.0], "positions": []}, "1 values in nll_by_position and 0"),
        ({"benchmark": "perplexity", "nll_by_position": [float("inf")], "positions": [0]}, "not a finite number"),
    ],
)
def test_damaged_samples_are_refused_with_file_and_line(tmp_path, line, message):
    lines = sample_lines({("ruler", "vt", 4096): (3, 0.5)})
    folder = write_run(tmp_path / "run", lines)
    second = line if isinstance(line, str) else json.dumps(lines[1] | line)
    path = folder / "samples.jsonl"
    path.write_text("\n".join([json.dumps(lines[0]), second, json.dumps(lines[2])]) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        write_results(folder)
    assert message in str(error.value) and "samples.jsonl" in str(error.value)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("content", ["{broken", "\0" * 400, "", '{"benchmark": "ruler", "ta{"benchmark": "ruler"}', "[" * 100_000])
def test_damaged_line_is_left_out_and_said_with_its_number(tmp_path, caplog, content):
    lines = sample_lines({("ruler", "vt", 4096): (3, 0.5)})
    folder = write_run(tmp_path / "run", lines)
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(lines[0]), content, json.dumps(lines[2])]) + "\n", encoding="utf-8")
    results = write_results(folder)
    assert results["tasks"][0]["num_samples"] == 2
    assert f"{folder}/samples.jsonl: line 2 is damaged and left out (line 2: not JSON" in caplog.text
    assert "samples.jsonl: line 2 is damaged" in results_page([results])
    (folder / "samples.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match="samples.jsonl holds no finished samples; line 1: not JSON"):
        write_results(folder)


def test_foreign_and_missing_files_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(UserError, match="run.json does not exist"):
        write_results(tmp_path)
    for content, message in [
        ("{}", "it lacks format, name"),
        ("[]", "holds a JSON list"),
        ("nonsense", "is not JSON"),
        (json.dumps(run_record(format=2)), "has format 2; this version reads format 1"),
        (json.dumps(run_record(phase=None)), "phase is None, not an object"),
        (json.dumps(run_record(seed="7")), "seed is '7', not an integer"),
    ]:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=message):
            write_results(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run_record()))
    with pytest.raises(UserError, match="samples.jsonl cannot be read"):
        write_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"results": {"hellaswag": {}}, "configs": {}}))
    with pytest.raises(UserError, match="is no results.json of refine_titan: it lacks .*; found: 'results', 'configs'"):
        read_results(tmp_path)


def test_lengths_and_percents_read_as_in_the_paper():
    assert [length_label(n) for n in (4096, 131072, 1000, None)] == ["4K", "128K", "1,000", "any"]
    assert percent_with_interval(0.462, [0.43, 0.49]) == "46.2 ±3.0"
    assert percent_with_interval(0.0, [0.0, 0.03]) == "0.0 ≤3.0"
    assert percent_with_interval(None, None) == "–"
