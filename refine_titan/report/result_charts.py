"""Charts of the results of one or several evaluation runs."""

import math
from collections.abc import Sequence

from refine_titan.report.axes import Axis, axis_of, axis_over, step_axis
from refine_titan.report.charts import Bar, Chart, Line, bar_chart, heat_map, line_chart
from refine_titan.report.paper_layout import BENCHMARKS, length_label
from refine_titan.report.records import Record
from refine_titan.report.result_tables import perplexity_with_interval
from refine_titan.report.results import perplexity_of

# If every length has the same even grid of depths, not finer than RULER's 40, a heat map has a column for each depth.
# Otherwise it has this many bins of equal width.
MAX_DEPTHS, DEPTH_BINS = 40, 10


def result_charts(runs: Sequence[Record]) -> list[Chart]:
    """Makes every chart that the runs have numbers for."""
    return [*task_bars(runs), *length_panels(runs), *(depth_maps(runs[0]) if len(runs) == 1 else []), *perplexity_curves(runs)]


def task_bars(runs: Sequence[Record]) -> list[Chart]:
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
            axis = axis_over((end for bar in bars for end in (bar.value or 0, *(bar.interval or ()))), 6, with_zero=True)
            charts.append(bar_chart(f"{label}: score by task", bars, axis, "%", _names(runs)))
    return charts


def length_panels(runs: Sequence[Record]) -> list[Chart]:
    """Makes a panel for each average that has several lengths, with a curve for each run. All have the same vertical axis."""
    panels: dict[str, list[Line]] = {}
    for name in dict.fromkeys(name for run in runs for name in run["averages"] if name != "NIAH"):
        lines = []
        for series, run in enumerate(runs):
            cells = [c for c in run["averages"].get(name, {"by_length": []})["by_length"] if c["length"]]
            points = [(c["length"], 100 * c["score"]) for c in cells]
            if points:
                lines.append(Line(run["name"], points, [_in_percent(c["ci95"]) for c in cells], series))
        if len({x for line in lines for x, _ in line.points}) > 1:
            panels[name] = lines
    axis = axis_over((end for lines in panels.values() for end in _ends(lines)), with_zero=True)
    return [_length_panel(name, lines, axis, _names(runs)) for name, lines in panels.items()]


def depth_maps(results: Record) -> list[Chart]:
    """Makes a heat map for each task whose needles have a depth, with a row for each length."""
    tasks = dict.fromkeys(row["task"] for row in results["tasks"] if row.get("by_depth"))
    maps = []
    for task in tasks:
        rows = [row for row in results["tasks"] if row["task"] == task and row.get("by_depth")]
        edges, labels = _depth_columns(rows)
        values = [[_pool_depths(row, edges, i) for i in range(len(edges))] for row in rows]
        maps.append(heat_map(task, [length_label(row["length"]) for row in rows], labels, values))
    return maps


def perplexity_curves(runs: Sequence[Record]) -> list[Chart]:
    """Makes a panel of perplexity by position for each task and length, with a curve for each run."""
    cells = dict.fromkeys((row["task"], row["length"]) for run in runs for row in run["tasks"] if row.get("by_position"))
    return [_perplexity_panel(runs, *cell) for cell in cells]


def perplexity_notes(runs: Sequence[Record]) -> list[str]:
    """Says the perplexity of each run, task and length, and over how many documents."""
    return [
        (f"{run['name']}, " if len(runs) > 1 else "")
        + f"{_documents(row['task'], row['length'])}: {perplexity_with_interval(row)} over {row['num_samples']:,} documents"
        for run in runs
        for row in run["tasks"]
        if row.get("by_position")
    ]


def _length_panel(name: str, lines: Sequence[Line], axis: Axis, names: Sequence[str]) -> Chart:
    lengths = sorted({x for line in lines for x, _ in line.points})
    return line_chart(name, lines, axis, axis_of(lengths), ("%", "tokens"), names)


def _perplexity_panel(runs: Sequence[Record], task: str, length: int | None) -> Chart:
    lines = []
    for series, run in enumerate(runs):
        for row in run["tasks"]:
            if (row["benchmark"], row["task"], row["length"]) != ("perplexity", task, length) or not row.get("by_position"):
                continue
            bins = row["by_position"]
            points = [(bin_["position"], perplexity_of(bin_["nll"])) for bin_ in bins]
            intervals = [bin_["ci95"] and [perplexity_of(end) for end in bin_["ci95"]] for bin_ in bins]
            lines.append(Line(run["name"], points, intervals, series))
    places = [x for line in lines for x, _ in line.points]
    first, last = min(places), max(places)
    x_axis = step_axis(first, last) if last < 2048 else Axis(first, last, _position_ticks(first, last))
    labels = ("perplexity", "position in the document (start of the bin)")
    return line_chart(_documents(task, length), lines, axis_over(_ends(lines)), x_axis, labels, _names(runs), (860, 280))


def _documents(task: str, length: int | None) -> str:
    return f"{task}, " * (task != "perplexity") + (f"documents of {length_label(length)} tokens" if length else "documents")


def _bar(mean: Record, series: int) -> Bar:
    lengths = [length_label(length) for length in mean["lengths"]]
    note = f"{mean['num_samples']:,} samples" + (f" of {', '.join(lengths)}" if len(lengths) > 1 else "")
    return Bar(mean["task"], 100 * mean["score"], _in_percent(mean["ci95"]), note, series)


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


def _position_ticks(first: float, last: float) -> list[float]:
    """At most 9 ticks: multiples of a power of two."""
    step = max(1024, 2 ** math.ceil(math.log2(last / 8)))
    return [i * step for i in range(math.ceil(first / step), int(last // step) + 1)]


def _names(runs: Sequence[Record]) -> list[str]:
    """Names of the series, if there are several."""
    return [run["name"] for run in runs] if len(runs) > 1 else []


def _ends(lines: Sequence[Line]) -> list[float]:
    """Every value of curves, and the ends of their intervals."""
    return [end for line in lines for i, (_, y) in enumerate(line.points) for end in (y, *(line.intervals[i] or ()))]


def _in_percent(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]
