"""Reads what the stages of an experiment have written: the measures of a checkpoint, and the course and cost of a training."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines
from refine_titan.monitoring.metric_names import STEP_SECONDS, read_metrics
from refine_titan.report.paper_layout import length_label
from refine_titan.report.records import read_object
from refine_titan.report.results import read_results
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.trainings import Training

# Curves that are drawn, by metric: title and unit.
CURVES = {
    "refine/ntp_loss": ("next-token loss", "nats a token"),
    "rollout/reward_mean": ("reward", "mean of a step"),
    "rollout/match_mean": ("rollout tokens that match", "share"),
}
# Quantile of the seconds of a training's steps that stands for a step: other work on the machine makes most of them longer.
UNDISTURBED = 0.1
# Training figures are means over this last share of a run, in percent.
LAST_PERCENT = 20
Course = dict[str, np.ndarray]
"""Values `[n]` by metric at each step of a training, with `step` and the `seconds` until its end; NaN where a step has none."""


@dataclass(frozen=True)
class Cost:
    """What a training took: steps, tokens and seconds, with those of the arms that it goes on from."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Sampling:
    """What the primary measure of one seed is the mean of.

    Attributes:
        terms: samples of all tasks and lengths, or tokens and positions of a text.
        seconds: what a sample took, with its test-time training; None for a text.
    """

    terms: int
    seconds: float | None


def measures_of(experiment: Experiment, fork: int, arm: str, seed: int) -> dict[str, float]:
    """Reads the measures of an arm's checkpoint by name, such as `ruler/niah_single_1 4K`, `ruler/mean` or `text/loss`.

    Raises:
        UserError: if a file is missing or damaged.
    """
    readers, found = {"ruler": _scores, "text": _text_measures}, {}
    for measure in experiment.plan.measures:
        found |= readers[measure](experiment.measure_folder(fork, arm, seed, measure))
    return found


def is_loss(measure: str) -> bool:
    """Whether lower values of a measure are better: losses and perplexities."""
    return "loss" in measure or "perplexity" in measure


def is_share(measure: str) -> bool:
    """Whether a measure is a score from 0 to 1 that tables show in percent."""
    return not measure.startswith(("text/", "perplexity/"))


def course_of(training: Training) -> Course:
    """Reads the course of a training.

    Raises:
        UserError: if it has no finished step.
    """
    path = training.folder / "metrics.jsonl"
    damaged = DamagedLines(path)
    columns = read_metrics(path, [STEP_SECONDS, *CURVES], damaged)
    damaged.warn()
    if not np.any(~np.isnan(columns[STEP_SECONDS])):
        raise UserError(f"{path} holds no finished step")
    seconds_n = columns.pop(STEP_SECONDS)
    return columns | {"seconds": float(np.nanquantile(seconds_n, UNDISTURBED)) * np.arange(1, len(seconds_n) + 1)}


def cost_of(experiment: Experiment, fork: int, arm: str, seed: int) -> Cost:
    """What an arm's training took after the fork; nothing for the fork itself."""
    training, _ = experiment.training(fork, arm, seed)
    trainings = training.since_start()
    seconds = sum(float(course_of(one)["seconds"][-1]) for one in trainings)
    return Cost(sum(one.steps[-1] for one in trainings), sum(one.tokens for one in trainings), seconds)


def sampling_of(experiment: Experiment, fork: int, arm: str, seed: int) -> Sampling:
    """What the primary measure of an arm's checkpoint is the mean of.

    Raises:
        UserError: if the file of the measure is damaged.
    """
    kind, _, name = experiment.plan.primary.partition("/")
    if kind == "text":
        path = experiment.measure_folder(fork, arm, seed, kind) / "measures.json"
        terms = read_object(path).get("terms")
        if not isinstance(terms, dict) or not isinstance(terms.get(name), int):
            raise UserError(f"{path} does not say of how many terms {name} is the mean: {{'terms': {{NAME: number}}}}")
        return Sampling(terms[name], None)
    rows = read_results(experiment.measure_folder(fork, arm, seed, "ruler") / "results.json")["tasks"]
    primary = [row for row in rows if experiment.plan.primary in (_score_name(row), f"{row['benchmark']}/mean")]
    times = [(row["num_samples"], row["seconds_per_sample"], row["adaptation_seconds_per_sample"] or 0.0) for row in primary]
    terms = sum(number for number, *_ in times)
    return Sampling(terms, sum(number * (answering + adapting) for number, answering, adapting in times) / terms)


def commits_of(experiment: Experiment, fork: int, arm: str, seed: int) -> set[str]:
    """The revisions of this program that trained and measured an arm's checkpoint, as far as the stages wrote them down."""
    training, _ = experiment.training(fork, arm, seed)
    found = [_written(one.folder / "versions.json") for one in training.line()]
    for measure, file in (("ruler", "run.json"), ("text", "measures.json")):
        if measure in experiment.plan.measures:
            found.append(_written(experiment.measure_folder(fork, arm, seed, measure) / file).get("versions"))
    commits = {versions.get("git_commit") for versions in found if isinstance(versions, dict)}
    return {commit for commit in commits if isinstance(commit, str)}


def _written(path: Path) -> dict:
    return read_object(path) if path.is_file() else {}


def last_values(course: Course) -> dict[str, float]:
    """Means of the metrics over the last steps of a training."""
    num_last = max(len(course["step"]) * LAST_PERCENT // 100, 1)
    last = {name: course[name][-num_last:] for name in CURVES}
    return {name: float(np.nanmean(values)) for name, values in last.items() if np.any(~np.isnan(values))}


def _scores(folder: Path) -> dict[str, float]:
    """Scores in [0, 1] by task and length, and their mean for each benchmark; the perplexity of a perplexity task."""
    found, by_benchmark = {}, defaultdict(list)
    for row in read_results(folder / "results.json")["tasks"]:
        benchmark = row["benchmark"]
        if row["score"] is None:
            raise UserError(f"{folder / 'results.json'}: {benchmark}/{row['task']} has no samples")
        found[_score_name(row)] = row["score"]
        if benchmark != "perplexity":
            by_benchmark[benchmark].append(row["score"])
    return found | {f"{benchmark}/mean": float(np.mean(scores)) for benchmark, scores in by_benchmark.items()}


def _score_name(row: dict) -> str:
    return f"{row['benchmark']}/{row['task']}" + ("" if row["length"] is None else f" {length_label(row['length'])}")


def _text_measures(folder: Path) -> dict[str, float]:
    path = folder / "measures.json"
    measures = read_object(path).get("measures")
    if not isinstance(measures, dict) or not all(isinstance(value, int | float) for value in measures.values()):
        raise UserError(f"{path} holds no measures: {{'measures': {{NAME: number}}}}")
    return {f"text/{name}": float(value) for name, value in measures.items()}
