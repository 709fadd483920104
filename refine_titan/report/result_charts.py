"""Charts of the results of one or several evaluation runs, as HTML."""

import math
from collections.abc import Sequence

from refine_titan.report.charts import Bar, Line, bar_chart, escape, heat_map, line_chart, nice_ticks
from refine_titan.report.markdown import perplexity_with_interval
from refine_titan.report.page import SERIES, legend
from refine_titan.report.paper_layout import BENCHMARKS, length_label
from refine_titan.report.records import Record
from refine_titan.report.results import perplexity_of

PERCENT_TICKS = (0, 20, 40, 60, 80, 100)
# If every length has the same even grid of depths, not finer than RULER's 40, a heat map has a column for each depth.
# Otherwise it has this many bins of equal width.
MAX_DEPTHS, DEPTH_BINS = 40, 10


def task_bars(runs: Sequence[Record]) -> str:
    """Makes a chart for each benchmark, with a bar for each task (mean over its lengths) and run."""
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
            # A shorter axis makes low scores readable.
            highest = max((bar.interval[1] for bar in bars if bar.interval is not None), default=100)
            ticks = PERCENT_TICKS if highest > 50 else nice_ticks(0, highest)
            charts.append(f"<h3>{escape(label)}</h3>" + bar_chart(f"{label}: score by task", bars, ticks))
    if not charts:
        return ""
    return "<p>Percent, mean over lengths; whiskers are 95 % confidence intervals.</p>" + _run_legend(runs) + "".join(charts)


def length_panels(runs: Sequence[Record]) -> str:
    """Makes a panel for each average that has several lengths, with a curve for each run."""
    names = dict.fromkeys(name for run in runs for name in run["averages"] if name != "NIAH")
    panels = []
    for name in names:
        lines = []
        for series, run in enumerate(runs):
            cells = [c for c in run["averages"].get(name, {"by_length": []})["by_length"] if c["length"]]
            points = [(c["length"], 100 * c["score"]) for c in cells]
            if points:
                lines.append(Line(run["name"], points, [_in_percent(c["ci95"]) for c in cells], series))
        lengths = sorted({x for line in lines for x, _ in line.points})
        if len(lengths) > 1:
            panels.append(line_chart(name, lines, "%", "tokens", PERCENT_TICKS, lengths, log_x=True))
    if not panels:
        return ""
    return "<p>Whiskers are 95 % confidence intervals.</p>" + _run_legend(runs) + f'<div class="panels">{"".join(panels)}</div>'


def depth_maps(results: Record) -> str:
    """Makes a heat map for each task whose needles have a depth, with a row for each length."""
    tasks = dict.fromkeys(row["task"] for row in results["tasks"] if row.get("by_depth"))
    maps = []
    for task in tasks:
        rows = [row for row in results["tasks"] if row["task"] == task and row.get("by_depth")]
        edges, labels = _depth_columns(rows)
        values = [[_pool_depths(row, edges, i) for i in range(len(edges))] for row in rows]
        maps.append(heat_map(task, [length_label(row["length"]) for row in rows], labels, values))
    if not maps:
        return ""
    intro = "<p>How often the needle was found, by its depth: from the start of the prompt (0 %) to its end (100 %).</p>"
    ramp = '<div class="legend"><span>0 %<span class="ramp"></span>100 %</span><span>dashed: no samples</span></div>'
    return f'{intro}{ramp}<div class="maps">{"".join(maps)}</div>'


def perplexity_curves(runs: Sequence[Record]) -> str:
    """Makes a panel of perplexity by position for each task and length, with a curve for each run."""
    cells = dict.fromkeys((row["task"], row["length"]) for run in runs for row in run["tasks"] if row.get("by_position"))
    panels = "".join(_perplexity_panel(runs, *cell) for cell in cells)
    note = "<p>Documents have equal weights; bands are 95 % confidence intervals over documents.</p>"
    return note + _run_legend(runs) + panels if panels else ""


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
            notes.append(f"{whose}{perplexity_with_interval(row)} over {row['num_samples']:,} documents")
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


def _bar(mean: Record, series: int) -> Bar:
    lengths = [length_label(length) for length in mean["lengths"]]
    note = f"{mean['num_samples']:,} samples" + (f" of {', '.join(lengths)}" if len(lengths) > 1 else "")
    return Bar(mean["task"], 100 * mean["score"], _in_percent(mean["ci95"]), note, series % SERIES)


def _depth_columns(rows: Sequence[Record]) -> tuple[list[float], list[str]]:
    """Depths at which the columns of a heat map begin, and the columns' labels."""
    grids = [[cell["depth"] for cell in row["by_depth"]] for row in rows]
    grid = grids[0]
    gaps = [after - before for before, after in zip(grid, grid[1:])]
    if all(other == grid for other in grids) and 1 < len(grid) <= MAX_DEPTHS and (grid[0], grid[-1]) == (0, 1):
        # RULER rounds depths to whole percents.
        if max(gaps) - min(gaps) < 0.011:
            return grid, [f"{100 * depth:.0f} %" for depth in grid]
    edges = [i / DEPTH_BINS for i in range(DEPTH_BINS)]
    return edges, [f"{100 * edge:.0f}–{100 * edge + 100 / DEPTH_BINS:.0f} %" for edge in edges]


def _pool_depths(row: Record, edges: Sequence[float], i: int) -> tuple[float, int] | None:
    """Mean score and number of samples of the depths from edge `i` up to the next edge; None without samples."""
    upper = edges[i + 1] if i + 1 < len(edges) else math.inf
    cells = [cell for cell in row["by_depth"] if edges[i] <= cell["depth"] < upper]
    count = sum(cell["num_samples"] for cell in cells)
    return (sum(cell["score"] * cell["num_samples"] for cell in cells) / count, count) if count else None


def _position_ticks(last: float) -> list[float]:
    """At most 9 ticks: multiples of a power of two, from 0 on."""
    step = max(1024, 2 ** math.ceil(math.log2(last / 8)))
    return [i * step for i in range(math.ceil(last / step) + 1)]


def _run_legend(runs: Sequence[Record]) -> str:
    return legend([run["name"] for run in runs]) if len(runs) > 1 else ""


def _in_percent(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]
