"""Compares two evaluation runs sample by sample: differences of scores, their intervals and p values."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines
from refine_titan.report.paper_layout import BENCHMARKS, LONGBENCH_TASKS, RULER_GROUPS, length_label, paper_order
from refine_titan.report.records import (
    SAMPLES_FILE,
    Cell,
    Record,
    cell_name,
    cell_of,
    flatten,
    read_evaluation,
    read_samples,
    samples_sha256,
    stratum_name,
)
from refine_titan.report.results import SCORE_BOUNDS, nll_of, read_results, scores_of
from refine_titan.report.statistics import PairedTest, holm_adjusted, paired_test

# If one of these differs, the runs did not measure the same thing.
SAME_MEASUREMENT = ("protocol", "seed", "tokenizer_sha256", "haystack")
# These may differ: they are what a comparison is about, or do not matter.
OTHER_FIELDS = ("checkpoint", "weights_sha256", "model", "engine", "engine_dtype", "phase", "versions")


@dataclass(frozen=True)
class Run:
    """One of the two runs: its label, `run.json` and samples."""

    label: str
    record: Record
    samples: list[Record]


@dataclass(frozen=True)
class Row:
    """A task at one length, or an average of tasks, or of all of them.

    `unit` is "%" for scores, "nats" for perplexity (lower is better).
    """

    benchmark: str
    name: str
    length: int | None
    unit: str
    test: PairedTest
    holm_p: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs; differences are second minus first.

    Attributes:
        runs: the two runs, reduced to the samples that both have.
        tasks, averages: rows of the two tables; Holm's correction covers the rows of one table.
        overall: the mean of all scores, and that of all perplexity tasks, as far as there are any; each is tested once.
        unmatched: reason -> number of samples that are left out for it.
        warnings: differences that may make the runs incomparable.
        remarks: other differences of the runs.
    """

    runs: tuple[Run, Run]
    tasks: list[Row]
    averages: list[Row]
    overall: list[Row]
    unmatched: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def compare(first: Path, second: Path) -> Comparison:
    """Compares the runs of two folders, or of two `results.json` with their samples beside them.

    Raises:
        UserError: if a file is missing, damaged or of another format, or the runs share no sample.
    """
    runs = [_load(path) for path in (first, second)]
    names = [run.record["name"] for run in runs]
    labels = names if names[0] != names[1] else [f"{names[0]} (A)", f"{names[1]} (B)"]
    pairs, unmatched = _match(runs[0].samples, runs[1].samples)
    if not pairs:
        counts = "; ".join(f"{reason}: {count:,}" for reason, count in unmatched.items()) or "both are empty"
        raise UserError(f"no sample of {first} and {second} is the same (benchmark, task, length, index and prompt): {counts}")
    matched = tuple(Run(labels[i], runs[i].record, [pair[i] for pair in pairs]) for i in range(2))
    warnings = _differences(matched, SAME_MEASUREMENT) + _order_warnings(matched) + _metric_warnings(pairs)
    return Comparison(matched, *_tests(matched), unmatched=unmatched, warnings=warnings, remarks=_remarks(matched))


def _load(path: Path) -> Run:
    if path.is_dir():
        record, samples = read_evaluation(path)
        return Run(record["name"], record, samples)
    record = read_results(path)
    if not (path.parent / "samples.jsonl").is_file():
        raise UserError(f"{path} has no samples.jsonl beside it, which a comparison sample by sample needs")
    samples = read_samples(path.parent, DamagedLines(path.parent / SAMPLES_FILE))
    if samples_sha256(samples) != record["samples_sha256"]:
        raise UserError(f"{path} does not belong to the samples.jsonl beside it; compare the folder {path.parent} instead")
    return Run(record["name"], record, samples)


def _match(first: Sequence[Record], second: Sequence[Record]) -> tuple[list[tuple[Record, Record]], dict[str, int]]:
    others = {(*cell_of(record), record["index"]): record for record in second}
    pairs, reasons = [], Counter()
    for record in first:
        other = others.pop((*cell_of(record), record["index"]), None)
        if other is None:
            reasons["only in the first"] += 1
        elif other["prompt_sha256"] != record["prompt_sha256"]:
            reasons["with different prompts"] += 1
        else:
            pairs.append((record, other))
    if others:
        reasons["only in the second"] += len(others)
    return pairs, dict(reasons)


def _tests(runs: tuple[Run, Run]) -> tuple[list[Row], list[Row], list[Row]]:
    seed = runs[0].record["seed"]
    cells: list[dict[Cell, np.ndarray]] = []
    for run in runs:
        by_cell = defaultdict(list)
        for record in run.samples:
            by_cell[cell_of(record)].append(record)
        cells.append({cell: nll_of(found) if cell[0] == "perplexity" else scores_of(found) for cell, found in by_cell.items()})
    order = sorted(cells[0], key=paper_order)
    tasks = _rows([(cell[0], cell[1], cell[2], [cell]) for cell in order], cells, seed)
    groups = [(name, "ruler", names) for name, names in RULER_GROUPS.items()]
    groups += [("RULER QA", "ruler_qa", None), ("LongBench", "longbench", LONGBENCH_TASKS)]
    wanted = []
    for name, benchmark, names in groups:
        members = [cell for cell in order if cell[0] == benchmark and (names is None or cell[1] in names)]
        if len(members) > 1:
            wanted.append((benchmark, f"{name}, mean of {len(members)}", None, members))
    kinds = [[cell for cell in order if (cell[0] == "perplexity") == is_perplexity] for is_perplexity in (False, True)]
    overall = [_rows([(members[0][0], _overall_name(members), None, members)], cells, seed)[0] for members in kinds if members]
    return tasks, _rows(wanted, cells, seed), overall


def _overall_name(members: Sequence[Cell]) -> str:
    if len(members) > 1:
        return (
            f"mean of {len(members)} tasks"
            if len({cell[:2] for cell in members}) == len(members)
            else f"mean of {len(members)} tasks and lengths"
        )
    _, task, length = members[0]
    return task if length is None else f"{task}, {length_label(length)}"


def _rows(wanted: list[tuple[str, str, int | None, list[Cell]]], cells: list[dict[Cell, np.ndarray]], seed: int) -> list[Row]:
    tests = []
    for benchmark, _, _, members in wanted:
        strata = [{stratum_name(cell): side[cell] for cell in members} for side in cells]
        tests.append(paired_test(*strata, None if benchmark == "perplexity" else SCORE_BOUNDS, seed))
    adjusted = holm_adjusted([test.p_value for test in tests])
    return [
        Row(benchmark, name, length, "nats" if benchmark == "perplexity" else "%", test, p)
        for (benchmark, name, length, _), test, p in zip(wanted, tests, adjusted)
    ]


def _differences(runs: Sequence[Run], fields: Sequence[str]) -> list[str]:
    first, second = ({name: value for field in fields for name, value in flatten(run.record.get(field, "not set"), field)} for run in runs)
    return [
        f"{name} differs: {first.get(name, 'not set')} and {second.get(name, 'not set')}"
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]


def _remarks(runs: Sequence[Run]) -> list[str]:
    """Differences of the other fields. Sizes are compared in models of one family, and if both runs have recorded them."""
    first, second = (run.record["model"] for run in runs)
    are_comparable = first.get("name") == second.get("name") and "args" in first and "args" in second
    return [line for line in _differences(runs, OTHER_FIELDS) if are_comparable or not line.startswith("model.args.")]


def _order_warnings(runs: Sequence[Run]) -> list[str]:
    return [
        f"{run.label} carries weights over from sample to sample: its samples are not independent, which intervals and p values "
        "do not account for"
        for run in runs
        if (run.record["phase"].get("test_time_training") or {}).get("carry_over")
    ]


def _metric_warnings(pairs: list[tuple[Record, Record]]) -> list[str]:
    found = {}
    for a, b in pairs:
        names = [next(iter(record.get("metrics") or {}), None) for record in (a, b)]
        if names[0] != names[1]:
            found[cell_of(a)] = names
    return [f"{cell_name(cell)} is scored by {a} in the first and by {b} in the second" for cell, (a, b) in found.items()]


def row_name(row: Row) -> str:
    """Name of a row that includes its benchmark."""
    benchmark = BENCHMARKS.get(row.benchmark, row.benchmark)
    return row.name if row.name.startswith(benchmark) else f"{benchmark} {row.name}"
