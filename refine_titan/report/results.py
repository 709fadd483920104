"""Computes `results.json` of an evaluation run: scores by task and length with confidence intervals, and the paper's averages."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refine_titan.report.output import write_output
from refine_titan.report.paper_layout import LONGBENCH_TASKS, NIAH_GROUPS, OTHER_RULER_GROUPS, RULER_GROUPS, paper_order
from refine_titan.report.records import (
    RUN_FIELDS,
    Cell,
    Record,
    cell_of,
    check_format,
    read_evaluation,
    read_object,
    samples_sha256,
    stratum_name,
)
from refine_titan.report.statistics import Bounds, interval_of_mean, stratified_mean

RESULT_FIELDS = (*RUN_FIELDS, "task_names", "averages", "task_means", "samples_sha256")
ROW_FIELDS = (
    "benchmark",
    "task",
    "length",
    "metric",
    "num_samples",
    "skipped",
    "cut_prompts",
    "unadapted_prompts",
    "score",
    "ci95",
    "metrics",
)
SCORE_BOUNDS = (0.0, 1.0)


def write_results(folder: Path, evaluation: tuple[Record, list[Record]] | None = None) -> Record:
    """Computes the results of a run's folder, writes `results.json` there and returns it.

    Args:
        evaluation: the folder's run and samples; None if they have not been read.

    Raises:
        UserError: if `run.json` or `samples.jsonl` is missing, damaged or of another format.
    """
    results = aggregate(*(evaluation or read_evaluation(folder)))
    write_output(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def read_results(path: Path) -> Record:
    """Reads a `results.json`, given the file or its run's folder.

    Raises:
        UserError: if it is missing, or another program's file; the message names the fields found.
    """
    path = path / "results.json" if path.is_dir() else path
    results = read_object(path)
    check_format(path, results, "results.json", RESULT_FIELDS)
    for row in results["tasks"]:
        missing = [name for name in ROW_FIELDS if not isinstance(row, dict) or name not in row]
        if missing:
            check_format(path, row if isinstance(row, dict) else {}, "results.json (in tasks)", tuple(missing))
    return results


def aggregate(run: Record, samples: list[Record]) -> Record:
    """Computes the content of `results.json`, which docs/results.md describes."""
    cells: dict[Cell, list[Record]] = defaultdict(list)
    for sample in samples:
        cells[cell_of(sample)].append(sample)
    seed = run["seed"]
    rows = [
        perplexity_row(cell, cells[cell], seed) if cell[0] == "perplexity" else score_row(cell, cells[cell], seed)
        for cell in sorted(cells, key=paper_order)
    ]
    skipped = run.get("skipped") or {}
    for row in rows:
        row["skipped"] = skipped.get(f"{row['benchmark']}/{row['task']}", {})
    scores = {cell: scores_of(records) for cell, records in cells.items() if cell[0] != "perplexity"}
    return run | {
        "task_names": run["tasks"],
        "tasks": rows + _rows_without_samples(run, rows),
        "averages": averages(scores, seed),
        "task_means": task_means(scores, seed),
        "samples_sha256": samples_sha256(samples),
    }


def score_row(cell: Cell, records: list[Record], seed: int) -> Record:
    """Makes the results row of a task at one length."""
    names = list(records[0]["metrics"])
    metrics = {}
    for name in names:
        values_n = np.array([record["metrics"][name] for record in records if name in record["metrics"]])
        metrics[name] = _mean(cell, values_n, SCORE_BOUNDS, seed)
    row = _row(cell, records) | {"metric": names[0] if names else "score", "metrics": metrics}
    main = _mean(cell, scores_of(records), SCORE_BOUNDS, seed)
    row |= {"score": main["mean"], "ci95": main["ci95"]}
    depths = sorted({record["depth"] for record in records if record.get("depth") is not None})
    if depths:
        row["by_depth"] = [_at_depth(depth, records) for depth in depths]
    return row


def perplexity_row(cell: Cell, records: list[Record], seed: int) -> Record:
    """Makes the results row of a perplexity task. Every document has the same weight; intervals resample documents."""
    documents_n = nll_of(records)
    nll = _mean(cell, documents_n, None, seed)
    ends = nll["ci95"]
    perplexity = {"mean": perplexity_of(nll["mean"]), "ci95": None if ends is None else [perplexity_of(end) for end in ends]}
    by_position = defaultdict(list)
    for record in records:
        for position, value in zip(record["positions"], record["nll_by_position"]):
            by_position[position].append(value)
    curve = []
    for position, values in sorted(by_position.items()):
        mean = _mean(cell, np.array(values), None, seed)
        curve.append({"position": position, "nll": mean["mean"], "ci95": mean["ci95"], "num_documents": len(values)})
    return _row(cell, records) | {
        "metric": "perplexity",
        "score": perplexity["mean"],
        "ci95": perplexity["ci95"],
        "metrics": {"perplexity": perplexity, "nll": nll},
        "by_position": curve,
    }


def averages(scores: dict[Cell, np.ndarray], seed: int) -> dict[str, Record]:
    """Computes the paper's averages: RULER's groups by length and over lengths, RULER QA, LongBench. Tasks have equal weights.

    Args:
        scores: scores `[n]` of each cell's samples.
    """
    groups = [(name, "ruler", RULER_GROUPS[name]) for name in NIAH_GROUPS]
    groups.append(("NIAH", "ruler", tuple(task for name in NIAH_GROUPS for task in RULER_GROUPS[name])))
    groups += [(name, "ruler", RULER_GROUPS[name]) for name in OTHER_RULER_GROUPS]
    groups.append(("RULER QA", "ruler_qa", tuple(sorted({task for benchmark, task, _ in scores if benchmark == "ruler_qa"}))))
    groups.append(("LongBench", "longbench", LONGBENCH_TASKS))
    found = {}
    for name, benchmark, tasks in groups:
        cells = sorted((cell for cell in scores if cell[0] == benchmark and cell[1] in tasks), key=paper_order)
        if cells:
            found[name] = _average(tasks, cells, scores, seed)
    return found


def task_means(scores: dict[Cell, np.ndarray], seed: int) -> list[Record]:
    """Computes the mean of every task over its lengths, which have equal weights."""
    by_task: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in sorted(scores, key=paper_order):
        by_task[cell[:2]].append(cell)
    return [
        {"benchmark": benchmark, "task": task, "lengths": [length for _, _, length in cells]} | _stratified(cells, scores, seed)
        for (benchmark, task), cells in by_task.items()
    ]


def scores_of(records: Sequence[Record]) -> np.ndarray:
    """Scores `[n]` of samples."""
    return np.array([record["score"] for record in records], dtype=float)


def nll_of(records: Sequence[Record]) -> np.ndarray:
    """Mean loss `[n]` of each document in nats a token; the mean of its bins if the line has no `nll`."""
    return np.array([record.get("nll", np.mean(record["nll_by_position"])) for record in records], dtype=float)


def perplexity_of(nll: float) -> float:
    """Perplexity of a loss in nats a token. It stays finite, so that a diverged model does not break its report."""
    return math.exp(min(nll, 700.0))


def _average(tasks: Sequence[str], cells: list[Cell], scores: dict[Cell, np.ndarray], seed: int) -> Record:
    by_length: dict[int | None, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_length[cell[2]].append(cell)
    present = {task for _, task, _ in cells}
    return {
        "tasks": [task for task in tasks if task in present],
        "missing_tasks": [task for task in tasks if task not in present],
        "by_length": [
            {"length": length, "num_tasks": len(cells)} | _stratified(cells, scores, seed)
            for length, cells in sorted(by_length.items(), key=lambda entry: entry[0] or 0)
        ],
        "mean": _stratified(cells, scores, seed),
    }


def _stratified(cells: Sequence[Cell], scores: dict[Cell, np.ndarray], seed: int) -> Record:
    strata = {stratum_name(cell): scores[cell] for cell in cells}
    interval = interval_of_mean(strata, SCORE_BOUNDS, seed)
    return {"score": stratified_mean(strata), "ci95": list(interval), "num_samples": sum(map(len, strata.values()))}


def _mean(cell: Cell, values_n: np.ndarray, bounds: Bounds | None, seed: int) -> Record:
    interval = interval_of_mean({stratum_name(cell): values_n}, bounds, seed)
    return {"mean": float(values_n.mean()), "ci95": None if interval is None else list(interval)}


def _row(cell: Cell, records: list[Record]) -> Record:
    benchmark, task, length = cell
    prompts = "".join(record["prompt_sha256"] + "\n" for record in records)
    row = {
        "benchmark": benchmark,
        "task": task,
        "length": length,
        "num_samples": len(records),
        "cut_prompts": sum(bool(record.get("cut_tokens")) for record in records),
        "unadapted_prompts": sum(record.get("adaptation", {}).get("learnt_from") is False for record in records),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
    }
    for name, field in (("seconds_per_sample", "seconds"), ("adaptation_seconds_per_sample", "adaptation_seconds")):
        times = [record[field] for record in records if record.get(field) is not None]
        row[name] = sum(times) / len(times) if times else None
    return row


def _at_depth(depth: float, records: list[Record]) -> Record:
    scores = [record["score"] for record in records if record.get("depth") == depth]
    return {"depth": depth, "score": sum(scores) / len(scores), "num_samples": len(scores)}


def _rows_without_samples(run: Record, rows: list[Record]) -> list[Record]:
    """Makes a row for every task that was named and has no sample: all its rows were skipped, or the run was stopped."""
    names = [name for name in run["tasks"] if isinstance(name, str)] if isinstance(run["tasks"], list) else []
    skipped = run.get("skipped") or {}
    present = {f"{row['benchmark']}/{row['task']}" for row in rows}
    absent = [name for name in dict.fromkeys([*names, *skipped]) if name not in present and _is_task(name)]
    return [
        {
            "benchmark": name.split("/")[0],
            "task": name.split("/")[1],
            "length": None,
            "num_samples": 0,
            "cut_prompts": 0,
            "unadapted_prompts": 0,
            "metric": None,
            "score": None,
            "ci95": None,
            "metrics": {},
            "skipped": skipped.get(name, {}),
        }
        for name in absent
    ]


def _is_task(name: str) -> bool:
    return name.count("/") == 1 and name.split("/")[0] in ("ruler", "ruler_qa", "longbench", "questions", "perplexity") and "." not in name
