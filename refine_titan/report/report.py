"""`report.html` of an evaluation run: what was measured, scores with their intervals, charts, and answers to read."""

import math
from collections.abc import Sequence
from pathlib import Path

from refine_titan.report.charts import Bar, Line, bar_chart, escape, heat_map, line_chart, nice_ticks
from refine_titan.report.markdown import described, perplexity, results_page
from refine_titan.report.output import write_output
from refine_titan.report.page import SERIES, definitions, filtered, legend, page, table
from refine_titan.report.paper_layout import BENCHMARKS, length_label, paper_order, percent, percent_with_interval
from refine_titan.report.records import Record, cell_of, flatten, read_samples
from refine_titan.report.results import perplexity_of, write_results
from refine_titan.report.training_sections import training_sections

PERCENT_TICKS = (0, 20, 40, 60, 80, 100)
# A heat map has a column for each depth of an even grid that every length has in full, if it is not finer than RULER's of 40;
# else as many equal bins.
MAX_DEPTHS, DEPTH_BINS = 40, 10
# Of each task and length, and of each text.
SHOWN_SAMPLES, SHOWN_CHARACTERS, SHOWN_ANSWERS = 15, 2000, 8


def write_report(folder: Path, training: Path | None = None) -> Record:
    """Writes `results.json`, `results.md` and `report.html` of a run's folder; returns the results.

    Args:
        training: folder of the training run whose curves and rollouts the report shows.

    Raises:
        UserError: if `run.json`, `samples.jsonl` or the training run's metrics are missing or damaged.
    """
    results = write_results(folder)
    write_output(folder / "results.md", results_page([results]))
    write_output(folder / "report.html", report_page(results, read_samples(folder), training))
    return results


def report_page(results: Record, samples: Sequence[Record], training: Path | None = None) -> str:
    """The page as text."""
    sections = [
        ("", _tiles(results)),
        ("What was measured", definitions(described(results)) + _versions(results)),
        ("Averages", averages_table(results)),
        ("Score by task", task_bars([results])),
        ("Score by length", length_panels([results])),
        ("Needle by depth and length", depth_maps(results)),
        ("Perplexity by position", perplexity_curves([results])),
        *(training_sections(training) if training is not None else []),
        ("All tasks", _details(results)),
        ("Answers", answers(samples)),
    ]
    return page(results["name"], results["checkpoint"], sections)


def averages_table(results: Record) -> str:
    """The paper's averages by length."""
    groups = results["averages"]
    if not groups:
        return ""
    lengths = sorted({cell["length"] for group in groups.values() for cell in group["by_length"] if cell["length"]})
    rows = []
    for name, group in groups.items():
        by_length = {cell["length"]: cell for cell in group["by_length"]}
        cells = [percent_with_interval(by_length[n]["score"], by_length[n]["ci95"]) if n in by_length else "" for n in lengths]
        mean, tasks = group["mean"], _part(group).strip(" ()") or str(len(group["tasks"]))
        cells.append(percent_with_interval(mean["score"], mean["ci95"]))
        rows.append([name, tasks, *cells, f"{mean['num_samples']:,}"])
    header = ["", "tasks", *map(length_label, lengths), "mean", "samples"]
    note = "<p>Percent, with half the width of the 95 % confidence interval. Tasks and lengths weigh the same in a mean.</p>"
    return note + table(header, rows, classes={len(header) - 2: "strong", len(header) - 1: "ns"})


def task_bars(runs: Sequence[Record]) -> str:
    """A chart for each benchmark: a bar for each task, over all its lengths, and run."""
    charts = []
    means_and_rows = [entry for run in runs for entry in (*run["task_means"], *run["tasks"])]
    for benchmark, label in BENCHMARKS.items():
        if benchmark == "perplexity":
            continue
        bars = []
        tasks = dict.fromkeys(entry["task"] for entry in means_and_rows if entry["benchmark"] == benchmark)
        for task in tasks:
            for series, run in enumerate(runs):
                found = [mean for mean in run["task_means"] if (mean["benchmark"], mean["task"]) == (benchmark, task)]
                bars += [_bar(mean, series) for mean in found] or [Bar(task, None, series=series)]
        if bars:
            # Low scores are read better on a shorter axis.
            highest = max((bar.interval[1] for bar in bars if bar.interval is not None), default=100)
            ticks = PERCENT_TICKS if highest > 50 else nice_ticks(0, highest)
            charts.append(f"<h3>{escape(label)}</h3>" + bar_chart(f"{label}: score by task", bars, ticks))
    if not charts:
        return ""
    return "<p>Percent, mean over lengths; whiskers are 95 % confidence intervals.</p>" + _keys(runs) + "".join(charts)


def length_panels(runs: Sequence[Record]) -> str:
    """A panel for each average, a curve for each run; nothing where there is one length only."""
    names = dict.fromkeys(name for run in runs for name in run["averages"] if name != "NIAH")
    panels = []
    for name in names:
        lines = []
        for series, run in enumerate(runs):
            cells = [c for c in run["averages"].get(name, {"by_length": []})["by_length"] if c["length"]]
            points = [(c["length"], 100 * c["score"]) for c in cells]
            if points:
                lines.append(Line(run["name"], points, [_hundred(c["ci95"]) for c in cells], series))
        lengths = sorted({x for line in lines for x, _ in line.points})
        if len(lengths) > 1:
            panels.append(line_chart(name, lines, "%", "tokens", PERCENT_TICKS, lengths, log_x=True))
    if not panels:
        return ""
    return "<p>Whiskers are 95 % confidence intervals.</p>" + _keys(runs) + f'<div class="panels">{"".join(panels)}</div>'


def depth_maps(results: Record) -> str:
    """A heat map for each task with a needle of known depth: a row for each length."""
    tasks = dict.fromkeys(row["task"] for row in results["tasks"] if row.get("by_depth"))
    maps = []
    for task in tasks:
        rows = [row for row in results["tasks"] if row["task"] == task and row.get("by_depth")]
        edges, labels = _depth_columns(rows)
        values = [[_pooled(row, edges, i) for i in range(len(edges))] for row in rows]
        maps.append(heat_map(task, [length_label(row["length"]) for row in rows], labels, values))
    if not maps:
        return ""
    intro = "<p>Where the needle lies, from the start of the prompt to its end, and how often it was found.</p>"
    ramp = '<div class="legend"><span>0 %<span class="ramp"></span>100 %</span><span>dashed: no samples</span></div>'
    return f'{intro}{ramp}<div class="maps">{"".join(maps)}</div>'


def perplexity_curves(runs: Sequence[Record]) -> str:
    """Perplexity by position, a panel for each task and length and a curve for each run."""
    cells = dict.fromkeys((row["task"], row["length"]) for run in runs for row in run["tasks"] if row.get("by_position"))
    panels = "".join(_perplexity_panel(runs, *cell) for cell in cells)
    note = "<p>Every document counts once; bands are 95 % confidence intervals over documents.</p>"
    return note + _keys(runs) + panels if panels else ""


def _perplexity_panel(runs: Sequence[Record], task: str, length: int | None) -> str:
    lines, notes = [], []
    for series, run in enumerate(runs):
        for row in run["tasks"]:
            if (row["benchmark"], row["task"], row["length"]) != ("perplexity", task, length) or not row.get("by_position"):
                continue
            bins = row["by_position"]
            points = [(bin_["position"], perplexity_of(bin_["nll"])) for bin_ in bins]
            intervals = [bin_["ci95"] and [perplexity_of(end) for end in bin_["ci95"]] for bin_ in bins]
            lines.append(Line(run["name"], points, intervals, series % SERIES))
            whose = f"{run['name']}: " if len(runs) > 1 else ""
            notes.append(f"{whose}{perplexity(row)} over {row['num_samples']:,} documents")
    ends = [end for line in lines for (_, y), ci in zip(line.points, line.intervals) for end in (y, *(ci or ()))]
    last = max(x for line in lines for x, _ in line.points)
    name = f"{task}, " * (task != "perplexity") + (f"documents of {length_label(length)} tokens" if length else "documents")
    x_ticks = _position_ticks(last) if last >= 2048 else nice_ticks(0, max(last, 1), 8)
    chart = line_chart(
        name,
        lines,
        "perplexity",
        "position in the document (start of the bin)",
        nice_ticks(min(ends), max(ends)),
        x_ticks,
        width=860,
        height=280,
    )
    return f"<p>{escape('; '.join(notes))}.</p>{chart}"


def answers(samples: Sequence[Record]) -> str:
    """The first samples of each task and length, to read; filtered by task and by how right they are."""
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
    return note + filtered(list(tasks), kinds, "".join(cards))


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
    return (
        f'<article data-task="{escape(sample["benchmark"])}/{escape(sample["task"])}" data-kind="{kind}">'
        f"<header><b>{escape(sample['task'])}</b>{spans}</header>"
        f'<div class="pair"><span>response</span><pre>{escape(response) or "<i>(empty)</i>"}</pre>'
        f"<span>answers</span><pre>{escape(shown)}</pre></div></article>\n"
    )


def _tiles(results: Record) -> str:
    tiles = [
        (name + _part(group), percent_with_interval(group["mean"]["score"], group["mean"]["ci95"]))
        for name, group in results["averages"].items()
        if name != "NIAH"
    ]
    counted = [row for row in results["tasks"] if row["benchmark"] == "perplexity" and row["num_samples"]]
    tiles += [("perplexity", f"{row['score']:.2f}") for row in counted]
    if not tiles:
        return '<p class="warning">No sample was finished.</p>'
    # The half width small beside the number.
    parts = [(name, *value.partition(" ")) for name, value in tiles]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(spread) or "&nbsp;"}</span></div>'
            for name, value, _, spread in parts
        )
        + "</div>"
    )


def _part(group: Record) -> str:
    """` (1 of 3)` for an average that lacks tasks."""
    total = len(group["tasks"]) + len(group["missing_tasks"])
    return f" ({len(group['tasks'])} of {total})" if group["missing_tasks"] else ""


def _details(results: Record) -> str:
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in results["tasks"]):
        rows = [_detail(row) for row in results["tasks"] if row["benchmark"] == benchmark]
        header = ["task", "metric", "other metrics", "length", "score", "samples", "cut", "skipped", "s a sample"]
        body = table(header, rows, left=3, classes={2: "left ns", 4: "strong"})
        parts.append(f"<h3>{escape(BENCHMARKS.get(benchmark, benchmark))}</h3>{body}")
    return "".join(parts)


def _detail(row: Record) -> list[str]:
    is_perplexity, seconds = row["benchmark"] == "perplexity", row.get("seconds_per_sample")
    shown = perplexity(row) if is_perplexity and row["num_samples"] else percent_with_interval(row["score"], row["ci95"])
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
    return f"<details><summary>versions and hashes</summary>{definitions(fields)}</details>"


def _bar(mean: Record, series: int) -> Bar:
    lengths = [length_label(length) for length in mean["lengths"]]
    note = f"{mean['num_samples']:,} samples" + (f" of {', '.join(lengths)}" if len(lengths) > 1 else "")
    return Bar(mean["task"], 100 * mean["score"], _hundred(mean["ci95"]), note, series % SERIES)


def _depth_columns(rows: Sequence[Record]) -> tuple[list[float], list[str]]:
    """Where the columns of a heat map begin, and their labels."""
    grids = [[cell["depth"] for cell in row["by_depth"]] for row in rows]
    grid = grids[0]
    gaps = [after - before for before, after in zip(grid, grid[1:])]
    if all(other == grid for other in grids) and 1 < len(grid) <= MAX_DEPTHS and (grid[0], grid[-1]) == (0, 1):
        # RULER rounds depths to whole percents.
        if max(gaps) - min(gaps) < 0.011:
            return grid, [f"{100 * depth:.0f} %" for depth in grid]
    edges = [i / DEPTH_BINS for i in range(DEPTH_BINS)]
    return edges, [f"{100 * edge:.0f}–{100 * edge + 100 / DEPTH_BINS:.0f} %" for edge in edges]


def _pooled(row: Record, edges: Sequence[float], i: int) -> tuple[float, int] | None:
    """Score and samples of the depths from edge i to the next one."""
    upper = edges[i + 1] if i + 1 < len(edges) else math.inf
    cells = [cell for cell in row["by_depth"] if edges[i] <= cell["depth"] < upper]
    count = sum(cell["num_samples"] for cell in cells)
    return (sum(cell["score"] * cell["num_samples"] for cell in cells) / count, count) if count else None


def _position_ticks(last: float) -> list[float]:
    """Multiples of a power of two from 0, at most 9."""
    step = max(1024, 2 ** math.ceil(math.log2(last / 8)))
    return [i * step for i in range(math.ceil(last / step) + 1)]


def _keys(runs: Sequence[Record]) -> str:
    return legend([run["name"] for run in runs]) if len(runs) > 1 else ""


def _hundred(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
