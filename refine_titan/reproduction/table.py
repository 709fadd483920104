"""Computes the comparison: scores by length of the checkpoint and of its two continuations, over the seeds; and its table."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines
from refine_titan.monitoring.metric_names import STEP_SECONDS, read_metrics
from refine_titan.report.paper_layout import length_label
from refine_titan.report.replicates import Estimate, estimate
from refine_titan.report.results import read_results
from refine_titan.report.tables import Table, latex_page, markdown_table
from refine_titan.reproduction.experiment import ARMS, OBJECTIVES, Experiment

# Losses are averaged over this last share of a run, in percent.
LAST_PERCENT = 20
# What is averaged there, and the metric that it is.
MEANS = {"ntp_loss": "refine/ntp_loss", "match_mean": "rollout/match_mean"}
NOTE = (
    "Percent of the answers found: mean over {n} seeds, and half the width of its 95 % confidence interval (Student's t). Each seed "
    "has its own training documents, rollouts and test samples; within a seed, all rows are tested on the same samples. The last row "
    "is the difference of the two continuations, taken seed by seed, with its p value (not corrected for the number of columns)."
)


def experiment_results(experiment: Experiment) -> dict[str, Any]:
    """Computes an experiment's scores by arm, column and seed, their estimates over seeds, and the continuations' losses and times.

    Raises:
        UserError: if an evaluation is missing, or the evaluations have different tasks.
    """
    by_run = {arm: [_scores(experiment, arm, seed) for seed in experiment.seeds] for arm in ARMS}
    columns = list(by_run["start"][0])
    if any(list(run) != columns for runs in by_run.values() for run in runs):
        raise UserError(f"{experiment.output}: the evaluations have different tasks or lengths; start again with another --output")
    scores = {arm: {column: np.array([run[column] for run in runs]) for column in columns} for arm, runs in by_run.items()}
    difference = {column: scores["refine"][column] - scores["ntp"][column] for column in columns}
    return {
        "name": experiment.name,
        "seeds": list(experiment.seeds),
        "columns": columns,
        "scores": {arm: {column: found[column].tolist() for column in columns} for arm, found in scores.items()},
        "estimates": {arm: {column: vars(estimate(found[column])) for column in columns} for arm, found in scores.items()},
        "difference": {column: vars(estimate(values)) for column, values in difference.items()},
        "training": {arm: _training(experiment, arm) for arm in OBJECTIVES},
    }


def _scores(experiment: Experiment, arm: str, seed: int) -> dict[str, float]:
    """Reads an evaluation's scores in [0, 1] by column; the last column is the mean of the others."""
    rows = read_results(experiment.evaluation_folder(arm, seed) / "results.json")["tasks"]
    scores = {f"{row['task']} {length_label(row['length'])}": row["score"] for row in rows}
    return scores | {"mean": float(np.mean(list(scores.values())))}


def _training(experiment: Experiment, arm: str) -> dict[str, float]:
    """Averages over seeds, at the end of the runs: next-token loss, seconds a step, and for ReFINE the share of right rollout tokens."""
    values = defaultdict(list)
    for seed in experiment.seeds:
        path = experiment.run_folder(arm, seed) / "metrics.jsonl"
        damaged = DamagedLines(path)
        columns = read_metrics(path, [STEP_SECONDS, *MEANS.values()], damaged)
        damaged.warn()
        num_last = max(len(columns["step"]) * LAST_PERCENT // 100, 1)
        last = {name: column[-num_last:] for name, column in columns.items()}
        found = {name: column[~np.isnan(column)] for name, column in last.items()}
        if not len(found[STEP_SECONDS]):
            raise UserError(f"{path} holds no finished step")
        values["step_seconds"].append(float(np.median(found[STEP_SECONDS])))
        for name, metric in MEANS.items():
            if len(found[metric]):
                values[name].append(float(np.mean(found[metric])))
    return {name: float(np.mean(found)) for name, found in values.items()}


def comparison_page(experiments: Sequence[dict[str, Any]]) -> str:
    """Makes a Markdown page of several experiments' results."""
    parts = ["# Next-token training and ReFINE from one checkpoint", _note(experiments)]
    for found in experiments:
        table = _table(found)
        parts.append(f"## {table.title}\n\n" + markdown_table(table.header, table.rows, table.left))
        parts.append(_cost(found["training"]))
    return "\n\n".join(parts) + "\n"


def comparison_latex(experiments: Sequence[dict[str, Any]]) -> str:
    """Makes the same tables for LaTeX."""
    return latex_page(map(_table, experiments), _note(experiments))


def _note(experiments: Sequence[dict[str, Any]]) -> str:
    return NOTE.format(n=len(experiments[0]["seeds"]))


def _table(found: dict[str, Any]) -> Table:
    rows = [[label, *(_percent(found["estimates"][arm][c]) for c in found["columns"])] for arm, label in ARMS.items()]
    rows.append(["ReFINE − next-token", *(_difference(found["difference"][c]) for c in found["columns"])])
    return Table(found["name"], [found["name"], *found["columns"]], rows)


def _percent(found: dict[str, Any]) -> str:
    value = Estimate(**found)
    return f"{100 * value.mean:.1f}" + ("" if value.half_width is None else f" ±{100 * value.half_width:.1f}")


def _difference(found: dict[str, Any]) -> str:
    value = Estimate(**found)
    mean = f"{round(100 * value.mean, 1) + 0.0:+.1f}"  # adding 0.0 turns -0.0 into 0.0
    if value.half_width is None:
        return mean
    p_value = "p below 0.001" if value.p_value < 0.001 else f"p {value.p_value:.3f}"
    return f"{mean} ±{100 * value.half_width:.1f} ({p_value})"


def _cost(training: dict[str, dict[str, float]]) -> str:
    ntp, refine = training["ntp"], training["refine"]
    return (
        f"At the end of the continuations, the next-token loss was {ntp['ntp_loss']:.4f} with next-token training and "
        f"{refine['ntp_loss']:.4f} with ReFINE. A step took {ntp['step_seconds']:.2f} and {refine['step_seconds']:.2f} s. "
        f"{100 * refine['match_mean']:.0f} % of ReFINE's rollout tokens were right."
    )
