"""The order and groups of tasks in the paper's tables, and the format of their numbers."""

from collections.abc import Sequence

from refine_titan.report.records import Cell

# Columns of the paper's RULER table, and the tasks of the benchmark "ruler" that each averages.
RULER_GROUPS = {
    "S-NIAH": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "MK-NIAH": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "MQ-NIAH": ("niah_multiquery",),
    "MV-NIAH": ("niah_multivalue",),
    "VT": ("vt",),
    "CWE": ("cwe",),
    "FWE": ("fwe",),
}
NIAH_GROUPS = ("S-NIAH", "MK-NIAH", "MQ-NIAH", "MV-NIAH")
OTHER_RULER_GROUPS = ("VT", "CWE", "FWE")
# The tasks of the paper's LongBench average.
LONGBENCH_TASKS = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "lcc",
    "repobench-p",
)
BENCHMARKS = {"ruler": "RULER", "ruler_qa": "RULER QA", "longbench": "LongBench", "questions": "own questions", "perplexity": "perplexity"}
_ORDER = {"ruler": [task for tasks in RULER_GROUPS.values() for task in tasks], "longbench": list(LONGBENCH_TASKS)}


def paper_order(cell: Cell) -> tuple:
    """Key that sorts cells in the paper's order; tasks that the paper does not have come last, by name."""
    benchmark, task, length = cell
    benchmarks, tasks = list(BENCHMARKS), _ORDER.get(benchmark, [])
    return (
        benchmarks.index(benchmark) if benchmark in benchmarks else len(benchmarks),
        benchmark,
        tasks.index(task) if task in tasks else len(tasks),
        task,
        length or 0,
    )


def length_label(length: int | None) -> str:
    """`4K` for 4096 tokens; `any` if samples state no length."""
    if length is None:
        return "any"
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def percent(value: float | None) -> str:
    """`46.2`; `–` if nothing was measured."""
    return "–" if value is None else f"{100 * value:.1f}"


def percent_with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """`46.2 ±3.1`, in percent; `–` if nothing was measured."""
    if value is None or interval is None:
        return percent(value)
    return with_interval(100 * value, [100 * end for end in interval], 1)


def with_interval(value: float, interval: Sequence[float] | None, digits: int) -> str:
    """`46.2 ±3.1`: a value and half the width of its interval, which need not be symmetric around the value.

    A value at one end of its interval, such as a perfect run's, is shown with the other end: `100.0 ≥97.0`.
    """
    if interval is None:
        return f"{value:.{digits}f}"
    low, high = interval
    if value >= high > low:
        return f"{value:.{digits}f} ≥{low:.{digits}f}"
    if value <= low < high:
        return f"{value:.{digits}f} ≤{high:.{digits}f}"
    return f"{value:.{digits}f} ±{(high - low) / 2:.{digits}f}"
