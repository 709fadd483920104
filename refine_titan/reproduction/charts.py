"""Draws an experiment: differences over forks, the main figure, and the course of the trainings."""

from collections.abc import Sequence

import numpy as np

from refine_titan.report.axes import Axis, axis_of, axis_over
from refine_titan.report.charts import Bar, Chart, Line, bar_chart, line_chart
from refine_titan.report.replicates import estimate
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.measures import CURVES, Course, course_of, is_share
from refine_titan.reproduction.results import Results, by_pair

# Points of a curve; each is the mean over its steps and over the seeds.
MAX_POINTS = 40
# Fewest forks whose differences are drawn as lines over the start's steps.
FORKS_OF_A_LINE = 3
MAIN_SIZE, PANEL_SIZE = (720, 340), (430, 220)


def main_chart(found: Results) -> Chart | None:
    """The differences of the primary measure with their corrected intervals: over the forks, or as bars where there are few."""
    primary, pairs = found["primary"], found["comparisons"]
    if not pairs:
        return None
    only_baseline = all(pair["against"] == found["baseline"] and not pair["label"] for pair in pairs)
    title = f"{primary}: difference{f' against {_against(found)}' if only_baseline else ''}, corrected 95 % intervals"
    if len(found["forks"]) >= FORKS_OF_A_LINE:
        return difference_over_forks(found, primary, title, corrected=True, size=MAIN_SIZE)
    bars, scale = [], _scale(primary)
    for pair in pairs:
        mean, half = pair["differences"][primary]["mean"], pair["corrected"]["half_width"]
        interval = None if half is None else [scale * (mean - half), scale * (mean + half)]
        same = [other for other in pairs if (other["arm"], other["against"]) == (pair["arm"], pair["against"])]
        where = f", from step {pair['fork']:,}" if len(same) > 1 else ""
        bars.append(Bar(f"{_name(found, pair)}{where}", scale * mean, interval, pair["answer"], _series(found, pair["arm"])))
    ends = [end for bar in bars for end in (bar.value, *(bar.interval or ()))]
    return bar_chart(title, bars, axis_over(ends, 6, with_zero=True), unit(primary), width=MAIN_SIZE[0])


def difference_over_forks(found: Results, measure: str, title: str, corrected: bool = False, size: tuple[int, int] = PANEL_SIZE) -> Chart:
    """Lines of the differences in a measure over the steps of the start's run; a faint line is no difference."""
    forks = found["forks"]
    return _differences(found, measure, title, {fork: fork for fork in forks}, axis_of(forks), "steps of the start", corrected, size)


def difference_over_gain(found: Results, measure: str) -> Chart:
    """The same over how much the baseline still gains on the fork by this measure."""
    gains = {fork: _scale(measure) * found["gains"][fork][measure]["mean"] for fork in found["forks"]}
    axis = axis_over(gains.values())
    label = f"gain of {found['arms'][found['baseline']]['label']} on the checkpoint"
    return _differences(found, measure, measure, gains, axis, label, corrected=False, size=PANEL_SIZE)


def training_charts(experiment: Experiment, fork: int) -> list[Chart]:
    """Curves of the arms' trainings from a fork: every metric over steps and over seconds, with 95 % intervals over seeds."""
    arms = [name for name, arm in experiment.plan.arms.items() if arm.train and arm.is_at(fork)]
    seeds = experiment.plan.seeds
    courses = {name: [course_of(experiment.training(fork, name, seed)[0]) for seed in seeds] for name in arms}
    charts = []
    for metric, (title, unit_name) in CURVES.items():
        for x, label in (("step", "step"), ("seconds", "seconds")):
            lines = [
                Line(experiment.plan.label(name), points, intervals, list(experiment.plan.arms).index(name))
                for name in arms
                for points, intervals in [_curve(courses[name], x, metric)]
                if points
            ]
            if lines:
                ends = [value for line in lines for _, value in line.points]
                places = [place for line in lines for place, _ in line.points]
                charts.append(
                    line_chart(
                        f"{title} over {label}s".replace("secondss", "seconds"),
                        lines,
                        axis_over(ends, 4),
                        axis_over(places),
                        (unit_name, label),
                        size=PANEL_SIZE,
                    )
                )
    return charts


def unit(measure: str) -> str:
    """Unit of differences in a measure."""
    return "points" if is_share(measure) else measure.partition("/")[2]


def pair_names(found: Results) -> list[str]:
    """Names of the comparisons, each of which has a colour in the charts over forks."""
    return [_name(found, pairs[0]) for pairs in by_pair(found)]


def _differences(
    found: Results, measure: str, title: str, places: dict[int, float], x: Axis, label: str, corrected: bool, size: tuple[int, int]
) -> Chart:
    scale, lines = _scale(measure), []
    names = pair_names(found)
    for number, pairs in enumerate(by_pair(found)):
        points, intervals = [], []
        for pair in sorted(pairs, key=lambda pair: places[pair["fork"]]):
            test = pair["differences"][measure]
            mean, half = test["mean"], pair["corrected"]["half_width"] if corrected else test["half_width"]
            points.append((places[pair["fork"]], scale * mean))
            intervals.append(None if half is None else [scale * (mean - half), scale * (mean + half)])
        lines.append(Line(names[number], points, intervals, number))
    ends = [end for line in lines for (_, value), i in zip(line.points, line.intervals) for end in (value, *(i or ()))]
    zero = Line("no difference", [(x.low, 0.0), (x.high, 0.0)], (), len(names), faint=True)
    return line_chart(title, [*lines, zero], axis_over(ends, 5, with_zero=True), x, (unit(measure), label), names, size)


def _curve(courses: Sequence[Course], x: str, metric: str) -> tuple[list[tuple[float, float]], list[list[float] | None]]:
    """Points of a metric and their intervals over seeds; none if the arm's trainings do not have it."""
    length = min(len(course["step"]) for course in courses)
    size, points, intervals = -(-length // MAX_POINTS), [], []
    for begin in range(0, length, size):
        part = slice(begin, min(begin + size, length))
        values = [course[metric][part] for course in courses]
        if any(np.all(np.isnan(value_n)) for value_n in values):
            continue
        test = estimate(np.array([np.nanmean(value_n) for value_n in values]))
        points.append((float(np.mean([course[x][part].mean() for course in courses])), test.mean))
        half = test.half_width
        intervals.append(None if half is None else [test.mean - half, test.mean + half])
    return points, intervals


def _name(found: Results, pair: dict) -> str:
    label = found["arms"][pair["arm"]]["label"]
    if pair["label"]:
        return pair["label"]
    return label if pair["against"] == found["baseline"] else f"{label} − {found['arms'][pair['against']]['label']}"


def _against(found: Results) -> str:
    return found["arms"][found["baseline"]]["label"]


def _series(found: Results, arm: str) -> int:
    """Number of an arm's colour; the fork, which has none of its own, has that of the baseline."""
    arms = list(found["arms"])[1:]
    return arms.index(arm if arm in arms else found["baseline"])


def _scale(measure: str) -> float:
    return 100.0 if is_share(measure) else 1.0
