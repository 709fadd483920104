"""Makes `report.html` of an evaluation run: what was measured, scores with their intervals, charts, and answers to read."""

from collections.abc import Sequence
from pathlib import Path

from refine_titan.report.charts import Chart
from refine_titan.report.escaping import escape
from refine_titan.report.markdown import results_page
from refine_titan.report.measurement import measurement_fields
from refine_titan.report.output import write_output
from refine_titan.report.page import definition_list, figure, figures, filterable_cards, html_page, html_table, tiles
from refine_titan.report.paper_layout import BENCHMARKS, length_label, paper_order, percent, percent_with_interval
from refine_titan.report.records import Record, cell_of, flatten, read_evaluation
from refine_titan.report.result_charts import depth_maps, length_panels, perplexity_curves, perplexity_notes, task_bars
from refine_titan.report.result_tables import perplexity_with_interval, results_csv, results_latex
from refine_titan.report.results import write_results
from refine_titan.report.training_sections import training_sections

# Shown samples of each task and length, characters of a text, and right answers of a sample.
SHOWN_SAMPLES, SHOWN_CHARACTERS, SHOWN_ANSWERS = 15, 2000, 8
BARS = "Percent, mean over lengths; whiskers are 95 % confidence intervals."
WHISKERS = "Whiskers are 95 % confidence intervals."
DEPTHS = "How often the needle was found, by its depth: from the start of the prompt (0 %) to its end (100 %)."
BANDS = "Documents have equal weights; bands are 95 % confidence intervals over documents."
RAMP = '<div class="legend"><span>0 %<span class="ramp"></span>100 %</span><span>dashed: no samples</span></div>'


def write_report(folder: Path, training: Path | None = None) -> Record:
    """Writes `results.json`, `results.md`, `results.tex`, `results.csv` and `report.html` into a run's folder; returns the results.

    Args:
        training: folder of a training run whose curves and rollouts the report shows too.

    Raises:
        UserError: if `run.json`, `samples.jsonl` or the training run's metrics are missing or damaged.
    """
    run, samples = read_evaluation(folder)
    results = write_results(folder, (run, samples))
    for name, make in (("results.md", results_page), ("results.tex", results_latex), ("results.csv", results_csv)):
        write_output(folder / name, make([results]))
    write_output(folder / "report.html", report_page(results, samples, training))
    return results


def report_page(results: Record, samples: Sequence[Record], training: Path | None = None) -> str:
    """Makes the HTML page."""
    sections = [
        ("", _tiles(results)),
        ("What was measured", definition_list(measurement_fields(results)) + _versions(results)),
        ("Averages", averages_table(results)),
        ("Score by task", _charts(BARS, task_bars([results]))),
        ("Score by length", _charts(WHISKERS, length_panels([results]), beside=True)),
        ("Needle by depth and length", _charts(DEPTHS, depth_maps(results), RAMP)),
        ("Perplexity by position", _charts(f"{'; '.join(perplexity_notes([results]))}. {BANDS}", perplexity_curves([results]))),
        *(training_sections(training) if training is not None else []),
        ("All tasks", _details(results)),
        ("Answers", answer_cards(samples)),
    ]
    return html_page(results["name"], results["checkpoint"], sections)


def _charts(note: str, charts: Sequence[Chart], keys: str = "", beside: bool = False) -> str:
    drawn = figures(charts) if beside else "".join(map(figure, charts))
    return f"<p>{escape(note)}</p>{keys}{drawn}" if charts else ""


def averages_table(results: Record) -> str:
    """Makes the table of the paper's averages by length."""
    groups = results["averages"]
    if not groups:
        return ""
    lengths = sorted({cell["length"] for group in groups.values() for cell in group["by_length"] if cell["length"]})
    rows = []
    for name, group in groups.items():
        by_length = {cell["length"]: cell for cell in group["by_length"]}
        cells = [percent_with_interval(by_length[n]["score"], by_length[n]["ci95"]) if n in by_length else "" for n in lengths]
        mean, tasks = group["mean"], _coverage(group).strip(" ()") or str(len(group["tasks"]))
        cells.append(percent_with_interval(mean["score"], mean["ci95"]))
        rows.append([name, tasks, *cells, f"{mean['num_samples']:,}"])
    header = ["", "tasks", *map(length_label, lengths), "mean", "samples"]
    note = "<p>Percent, with half the width of the 95 % confidence interval. Tasks and lengths have equal weights in a mean.</p>"
    return note + html_table(header, rows, classes={len(header) - 2: "strong", len(header) - 1: "ns"})


def answer_cards(samples: Sequence[Record]) -> str:
    """Makes cards of the first samples of each task and length, which a reader can filter by task and score."""
    cards, counts, tasks = [], {}, {}
    for sample in sorted(samples, key=lambda sample: (paper_order(cell_of(sample)), sample["index"])):
        if "response" not in sample:
            continue
        key = cell_of(sample)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= SHOWN_SAMPLES:
            tasks[f"{sample['benchmark']}/{sample['task']}"] = None
            cards.append(_card(sample))
    if not cards:
        return ""
    kinds = [("wrong", "score 0"), ("partly", "score between"), ("right", "score 1")]
    shown = f"{len(cards):,} of {sum(counts.values()):,}"
    note = f"<p>The first {SHOWN_SAMPLES} samples of each task and length: {shown}. All are in <code>samples.jsonl</code>.</p>"
    return note + filterable_cards(list(tasks), kinds, "".join(cards))


def _card(sample: Record) -> str:
    score, right = sample["score"], list(sample.get("answers") or [])
    shown = "\n".join(_clip(str(answer), 300) for answer in right[:SHOWN_ANSWERS])
    if len(right) > SHOWN_ANSWERS:
        shown += f"\n… and {len(right) - SHOWN_ANSWERS} more"
    facts = [length_label(sample["length"]) + " tokens" if sample["length"] else "", f"sample {sample['index']}"]
    facts += [f"depth {100 * sample['depth']:.0f} %" if sample.get("depth") is not None else ""]
    facts += [f"{name} {percent(value)}" for name, value in sample["metrics"].items()]
    facts += [f"{sample['cut_tokens']:,} tokens cut" if sample.get("cut_tokens") else ""]
    facts += [f"prompt {sample['prompt_sha256'][:12]}"]
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    kind = "right" if score == 1 else "wrong" if score == 0 else "partly"
    response = _clip(str(sample["response"]), SHOWN_CHARACTERS)
    end = str(sample.get("prompt_end") or "")[-SHOWN_CHARACTERS:]
    prompt = f"<span>prompt's end</span><pre>… {escape(end)}</pre>" if end else ""
    return (
        f'<article data-task="{escape(sample["benchmark"])}/{escape(sample["task"])}" data-kind="{kind}">'
        f"<header><b>{escape(sample['task'])}</b>{spans}</header>"
        f'<div class="pair">{prompt}<span>response</span><pre>{escape(response) or "<i>(empty)</i>"}</pre>'
        f"<span>answers</span><pre>{escape(shown)}</pre></div></article>\n"
    )


def _tiles(results: Record) -> str:
    shown = [
        (name + _coverage(group), percent_with_interval(group["mean"]["score"], group["mean"]["ci95"]))
        for name, group in results["averages"].items()
        if name != "NIAH"
    ]
    counted = [row for row in results["tasks"] if row["benchmark"] == "perplexity" and row["num_samples"]]
    shown += [("perplexity", f"{row['score']:.2f}") for row in counted]
    if not shown:
        return '<p class="warning">No sample was finished.</p>'
    # The page shows the half width in small print below the number.
    parts = [(name, *value.partition(" ")) for name, value in shown]
    return tiles((name, value, spread) for name, value, _, spread in parts)


def _coverage(group: Record) -> str:
    """` (1 of 3)` for an average over 1 of its 3 tasks; empty if it has all."""
    total = len(group["tasks"]) + len(group["missing_tasks"])
    return f" ({len(group['tasks'])} of {total})" if group["missing_tasks"] else ""


def _details(results: Record) -> str:
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in results["tasks"]):
        rows = [_detail(row) for row in results["tasks"] if row["benchmark"] == benchmark]
        header = ["task", "metric", "other metrics", "length", "score", "samples", "cut", "skipped", "s a sample"]
        body = html_table(header, rows, left=3, classes={2: "left ns", 4: "strong"})
        parts.append(f"<h3>{escape(BENCHMARKS.get(benchmark, benchmark))}</h3>{body}")
    return "".join(parts)


def _detail(row: Record) -> list[str]:
    is_perplexity, seconds = row["benchmark"] == "perplexity", row.get("seconds_per_sample")
    shown = perplexity_with_interval(row) if is_perplexity and row["num_samples"] else percent_with_interval(row["score"], row["ci95"])
    others = [
        f"{name} {metric['mean']:.3f}" if is_perplexity else f"{name} {percent(metric['mean'])}"
        for name, metric in row["metrics"].items()
        if name != row["metric"]
    ]
    counts = [f"{count:,}" for count in (row["num_samples"], row["cut_prompts"], sum(row["skipped"].values()))]
    time = "–" if seconds is None else f"{seconds:.2f}"
    return [row["task"], row["metric"] or "–", ", ".join(others), length_label(row["length"]), shown, *counts, time]


def _versions(results: Record) -> str:
    fields = [(name.removeprefix("versions."), value) for name, value in flatten(results["versions"], "versions")]
    fields += [
        ("weights sha256", results["weights_sha256"]),
        ("tokenizer sha256", results["tokenizer_sha256"]),
        ("samples sha256", results["samples_sha256"]),
    ]
    return f"<details><summary>versions and hashes</summary>{definition_list(fields)}</details>"


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
