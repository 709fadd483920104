"""The tables of the results of one or several runs, in the layout of the paper's, and the same numbers for programs to read.

A table has a row for each run. Scores are in percent, with half the width of their 95 % confidence interval.
"""

from collections.abc import Iterator, Sequence

from refine_titan.report.paper_layout import (
    BENCHMARKS,
    LONGBENCH_TASKS,
    NIAH_GROUPS,
    OTHER_RULER_GROUPS,
    length_label,
    percent_with_interval,
)
from refine_titan.report.records import Record
from refine_titan.report.tables import CSV_HEADER, Table, csv_page, latex_page

ABSENT = "–"
NOTE = "Percent, with half the width of the 95 % confidence interval. Tasks have equal weights in a mean."


def result_tables(runs: Sequence[Record]) -> list[Table]:
    """Makes every table that the runs have numbers for."""
    tables = [
        _averages_table("RULER: needle in a haystack", runs, NIAH_GROUPS),
        _averages_table("RULER: variable tracking, common words, frequent words", runs, OTHER_RULER_GROUPS),
        _tasks_table("RULER QA", runs, "ruler_qa"),
        _longbench_table(runs),
        _tasks_table("Own questions", runs, "questions"),
        _perplexity_table(runs),
    ]
    return [table for table in tables if table is not None]


def results_latex(runs: Sequence[Record]) -> str:
    """Makes `results.tex`: the tables, each with booktabs rules."""
    return latex_page(result_tables(runs), NOTE)


def results_csv(runs: Sequence[Record]) -> str:
    """Makes `results.csv`: a line for each metric of each task and length, and for each average. Scores are from 0 to 1."""
    return csv_page(CSV_HEADER, (row for run in runs for row in _csv_rows(run)))


def _csv_rows(run: Record) -> Iterator[Sequence[object]]:
    for row in run["tasks"]:
        for name, metric in row["metrics"].items():
            ends = metric["ci95"] or (None, None)
            yield run["name"], row["benchmark"], row["task"], row["length"], name, metric["mean"], *ends, row["num_samples"]
    for name, group in run["averages"].items():
        for cell in [*group["by_length"], {"length": "mean"} | group["mean"]]:
            yield run["name"], "average", name, cell["length"], "score", cell["score"], *(cell["ci95"] or (None, None)), cell["num_samples"]


def _averages_table(title: str, runs: Sequence[Record], names: Sequence[str]) -> Table | None:
    columns: list[tuple[str, int | None | str]] = []
    for name in names:
        lengths = sorted(
            {cell["length"] for run in runs if name in run["averages"] for cell in run["averages"][name]["by_length"]},
            key=lambda length: length or 0,
        )
        columns += [(name, length) for length in lengths] + ([(name, "mean")] if len(lengths) > 1 else [])
    if not columns:
        return None
    header = ["run", *(f"{name} {where if where == 'mean' else length_label(where)}" for name, where in columns)]
    return Table(title, header, [[run["name"], *(_average(run, *column) for column in columns)] for run in runs])


def _average(run: Record, name: str, where: int | None | str) -> str:
    group = run["averages"].get(name)
    if group is None:
        return ABSENT
    cells = [group["mean"]] if where == "mean" else [cell for cell in group["by_length"] if cell["length"] == where]
    if not cells:
        return ABSENT
    total = len(group["tasks"]) + len(group["missing_tasks"])
    part = f" ({len(group['tasks'])} of {total} tasks)" if group["missing_tasks"] else ""
    return percent_with_interval(cells[0]["score"], cells[0]["ci95"]) + part


def _tasks_table(title: str, runs: Sequence[Record], benchmark: str) -> Table | None:
    columns = list(
        dict.fromkeys(
            (row["task"], row["length"], metric)
            for run in runs
            for row in run["tasks"]
            if row["benchmark"] == benchmark and row["num_samples"]
            for metric in row["metrics"]
        )
    )
    if not columns:
        return None
    header = ["run", *(f"{task}{f' {length_label(length)}' if length else ''}, {metric}" for task, length, metric in columns)]
    body = []
    for run in runs:
        rows = {(row["task"], row["length"]): row for row in run["tasks"] if row["benchmark"] == benchmark}
        cells = [rows.get((task, length), {"metrics": {}})["metrics"].get(metric) for task, length, metric in columns]
        body.append([run["name"], *(ABSENT if m is None else percent_with_interval(m["mean"], m["ci95"]) for m in cells)])
    return Table(title, header, body)


def _longbench_table(runs: Sequence[Record]) -> Table | None:
    found = {mean["task"] for run in runs for mean in run["task_means"] if mean["benchmark"] == "longbench"}
    tasks = [task for task in LONGBENCH_TASKS if task in found] + sorted(found - set(LONGBENCH_TASKS))
    if not tasks:
        return None
    body = []
    for run in runs:
        means = {mean["task"]: mean for mean in run["task_means"] if mean["benchmark"] == "longbench"}
        cells = [percent_with_interval(means[t]["score"], means[t]["ci95"]) if t in means else ABSENT for t in tasks]
        body.append([run["name"], *cells, _average(run, "LongBench", "mean")])
    return Table("LongBench", ["run", *tasks, "average"], body)


def _perplexity_table(runs: Sequence[Record]) -> Table | None:
    body = [
        [run["name"], row["task"], length_label(row["length"]), str(row["num_samples"]), perplexity_with_interval(row)]
        for run in runs
        for row in run["tasks"]
        if row["benchmark"] == "perplexity" and row["num_samples"]
    ]
    return Table("Perplexity", ["run", "task", "length", "documents", BENCHMARKS["perplexity"]], body, left=2) if body else None


def perplexity_with_interval(row: Record) -> str:
    """`12.31 (11.90 to 12.80)`: perplexity of a row with its interval."""
    interval = "" if row["ci95"] is None else f" ({row['ci95'][0]:.2f} to {row['ci95'][1]:.2f})"
    return f"{row['score']:.2f}{interval}"
