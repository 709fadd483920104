"""Computes the results of an experiment: means over seeds, paired differences, and the answer to each comparison."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from refine_titan.config.type_checks import did_you_mean
from refine_titan.errors import UserError
from refine_titan.report.replicates import LEVEL, estimate
from refine_titan.report.statistics import holm_adjusted
from refine_titan.reproduction.arms import FORK, Comparison
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.measures import (
    Cost,
    Sampling,
    commits_of,
    cost_of,
    course_of,
    is_loss,
    last_values,
    measures_of,
    sampling_of,
)
from refine_titan.reproduction.settings import as_words

Results = dict[str, Any]
"""What `reproduction.json` has of an experiment; docs/reproduction.md describes it."""

ANSWERS = YES, NO, UNDECIDED = "yes", "no", "undecided"
# With fewer seeds, a comparison is undecided: an interval from so few values may be narrow by chance.
MIN_SEEDS = 5
# Trainings are matched in compute if their seconds differ by at most this share.
COMPUTE_TOLERANCE = 0.1


def experiment_results(experiment: Experiment) -> Results:
    """Computes an experiment's measures by fork, arm and seed, their estimates over seeds, and the comparisons.

    Raises:
        UserError: if a measure is missing, checkpoints have different measures, or the primary one is not among them.
    """
    plan = experiment.plan
    values = {fork: {arm: _measures(experiment, fork, arm) for arm in experiment.checkpoints(fork)} for fork in experiment.forks}
    names = _common_names(experiment, values)
    costs = {
        fork: {arm: _mean_cost([cost_of(experiment, fork, arm, seed) for seed in plan.seeds]) for arm in experiment.checkpoints(fork)}
        for fork in experiment.forks
    }
    samplings = {fork: {arm: _sampling(experiment, fork, arm) for arm in experiment.checkpoints(fork)} for fork in experiment.forks}
    found = [
        _comparison(pair, fork, values[fork], costs[fork], names, plan.primary)
        for fork in experiment.forks
        for pair in plan.comparisons
        if plan.compared_at(pair, fork)
    ]
    _correct(found, values, plan.primary, plan.left_out)
    if plan.missing:
        for pair in found:
            pair["answer"] = UNDECIDED
    arms = {FORK: {"label": plan.label(FORK), "settings": ""}} | {
        name: {"label": arm.label, "settings": as_words(arm.settings), "measured_with": as_words(arm.measured_with)}
        for name, arm in plan.arms.items()
    }
    return {
        "name": experiment.title,
        "seeds": list(plan.seeds),
        "missing_seeds": list(plan.missing),
        "commits": _commits(experiment),
        "forks": list(experiment.forks),
        "arms": arms,
        "baseline": plan.baseline,
        "primary": plan.primary,
        "measures": names,
        "values": {fork: {arm: {name: list(v[name]) for name in names} for arm, v in by_arm.items()} for fork, by_arm in values.items()},
        "estimates": {
            fork: {arm: {name: asdict(estimate(v[name])) for name in names} for arm, v in by_arm.items()} for fork, by_arm in values.items()
        },
        "gains": {
            fork: {name: asdict(estimate(by_arm[plan.baseline][name] - by_arm[FORK][name])) for name in names}
            for fork, by_arm in values.items()
        },
        "costs": {fork: {arm: asdict(cost) for arm, cost in by_arm.items()} for fork, by_arm in costs.items()},
        "samplings": {fork: {arm: asdict(sampling) for arm, sampling in by_arm.items()} for fork, by_arm in samplings.items()},
        "training": {fork: _last_values(experiment, fork) for fork in experiment.forks},
        "comparisons": found,
    }


def _commits(experiment: Experiment) -> list[str]:
    """The revisions of this program that trained and measured."""
    seeds = experiment.plan.seeds
    found = (commits_of(experiment, fork, arm, seed) for fork in experiment.forks for arm in experiment.checkpoints(fork) for seed in seeds)
    return sorted(set().union(*found))


def good_direction(measure: str) -> int:
    """1 if higher values of a measure are better, -1 if lower ones are."""
    return -1 if is_loss(measure) else 1


def answer(difference: float, half_width: float | None, measure: str, num_seeds: int) -> str:
    """Whether an arm is better than another one by the primary measure: `yes`, `no` (it is worse), or `undecided`.

    Args:
        difference: mean of the paired differences.
        half_width: half the width of its corrected interval; None for a single seed, 0 if all seeds have the same difference, which
            happens by the coarse steps of a share and says nothing of the spread.
    """
    if not half_width or num_seeds < MIN_SEEDS:
        return UNDECIDED
    gain = good_direction(measure) * difference
    return YES if gain > half_width else NO if gain < -half_width else UNDECIDED


def _measures(experiment: Experiment, fork: int, arm: str) -> dict[str, np.ndarray]:
    """Measures of an arm over the seeds, by name; those that every seed has."""
    by_seed = [measures_of(experiment, fork, arm, seed) for seed in experiment.plan.seeds]
    return {name: np.array([found[name] for found in by_seed]) for name in by_seed[0] if all(name in found for found in by_seed)}


def _common_names(experiment: Experiment, values: dict[int, dict[str, dict[str, np.ndarray]]]) -> list[str]:
    """Names of the measures that all checkpoints have, the primary one first."""
    every = [found for by_arm in values.values() for found in by_arm.values()]
    names, primary = [name for name in every[0] if all(name in found for found in every)], experiment.plan.primary
    if primary not in names:
        where = f"{experiment.plan.path}: primary is {primary!r}"
        raise UserError(f"{where}{did_you_mean(primary, names)}; the checkpoints have {', '.join(names)}")
    return [primary, *(name for name in names if name != primary)]


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(costs[0].steps, costs[0].tokens, float(np.median([cost.seconds for cost in costs])))


def _sampling(experiment: Experiment, fork: int, arm: str) -> Sampling:
    """The fewest terms of a seed, and the median of the seconds."""
    samplings = [sampling_of(experiment, fork, arm, seed) for seed in experiment.plan.seeds]
    seconds = [sampling.seconds for sampling in samplings if sampling.seconds is not None]
    return Sampling(min(sampling.terms for sampling in samplings), float(np.median(seconds)) if seconds else None)


def by_pair(found: Results) -> list[list[dict[str, Any]]]:
    """The comparisons of an experiment, those of the same two arms together."""
    names = dict.fromkeys((pair["arm"], pair["against"]) for pair in found["comparisons"])
    return [[pair for pair in found["comparisons"] if (pair["arm"], pair["against"]) == name] for name in names]


def _last_values(experiment: Experiment, fork: int) -> dict[str, dict[str, float]]:
    """For each arm that trains, the training's figures at its end: means over seeds."""
    found = {}
    for name, arm in experiment.plan.arms.items():
        if arm.train and arm.is_at(fork):
            by_seed = [last_values(course_of(experiment.training(fork, name, seed)[0])) for seed in experiment.plan.seeds]
            found[name] = {metric: float(np.mean([values[metric] for values in by_seed])) for metric in by_seed[0]}
    return found


def _comparison(
    pair: Comparison, fork: int, values: dict[str, dict[str, np.ndarray]], costs: dict[str, Cost], names: Sequence[str], primary: str
) -> dict[str, Any]:
    first, second = values[pair.arm], values[pair.against]
    cost, other = costs[pair.arm], costs[pair.against]
    ratio = cost.seconds / other.seconds if other.seconds else None
    return {
        "fork": fork,
        "arm": pair.arm,
        "against": pair.against,
        "matched": pair.matched,
        "label": pair.label,
        # Arms that are only measured take no steps, which is nothing that two of them have in common.
        "same_steps": 0 < cost.steps == other.steps,
        "same_tokens": 0 < cost.tokens == other.tokens,
        "seconds_ratio": ratio,
        "steps_of_equal_seconds": None if ratio is None else round(other.steps * ratio),
        "same_compute": ratio is not None and abs(ratio - 1) <= COMPUTE_TOLERANCE,
        "differences": {name: asdict(estimate(first[name] - second[name])) for name in names},
    }


def _correct(comparisons: list[dict[str, Any]], values: dict[int, dict[str, dict[str, np.ndarray]]], primary: str, left_out: int) -> None:
    """Adds to each comparison the primary difference with its interval and p value, corrected for all comparisons and `left_out` more,
    and the answer."""
    num, tests = len(comparisons) + left_out, []
    for found in comparisons:
        by_arm = values[found["fork"]]
        tests.append(estimate(by_arm[found["arm"]][primary] - by_arm[found["against"]][primary], 1 - (1 - LEVEL) / num))
    p_values = [test.p_value for test in tests]
    # Those that are left out count as the ones with the largest p values, which adjusts the others most.
    holm = holm_adjusted([*p_values, *([1.0] * left_out)]) if None not in p_values else [None] * len(tests)
    for found, test, p_value in zip(comparisons, tests, holm):
        found |= {"corrected": {"number": num, "half_width": test.half_width, "p_value": p_value}}
        found["answer"] = answer(test.mean, test.half_width, primary, test.n)
