"""Intervals and p values against closed forms and known coverage."""

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from refine_titan.report import statistics
from refine_titan.report.statistics import holm_adjusted, interval_of_mean, paired_test, sign_flip_p_value, stratified_mean

UNIT = (0.0, 1.0)


def test_interval_of_many_normal_values_is_that_of_the_normal_distribution():
    values_n = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    low, high = interval_of_mean({"a": values_n}, None, 1)
    error = values_n.std(ddof=1) / math.sqrt(2000)
    # 10,000 resamples place a 2.5 % quantile within a few percent of the standard error.
    assert low == pytest.approx(values_n.mean() - 1.96 * error, abs=0.08 * error)
    assert high == pytest.approx(values_n.mean() + 1.96 * error, abs=0.08 * error)


def test_interval_covers_the_true_mean_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    for true, n in ((0.5, 50), (0.9, 30), (0.97, 20)):
        covered = 0
        for trial in range(300):
            low, high = interval_of_mean({"a": (rng.random(n) < true).astype(float)}, UNIT, trial)
            covered += low - 1e-9 <= true <= high + 1e-9
        # Of 300 trials at 95 %, fewer than 272 happen once in 1,000 cases; percentile intervals reach 130 at (0.97, 20).
        assert covered >= 272, (true, n, covered)


def test_interval_of_skewed_values_is_corrected_for_bias_and_acceleration():
    values_n = np.exp(np.linspace(-2, 2, 20))
    deviation_n = values_n - values_n.mean()
    acceleration = (deviation_n**3).sum() / (6 * (deviation_n**2).sum() ** 1.5)
    means_R = values_n[np.random.default_rng(0).integers(0, 20, size=(200_000, 20))].mean(axis=1)
    normal = NormalDist()
    bias = normal.inv_cdf(np.mean(means_R < values_n.mean()))
    z = [bias + side for side in (-1.95996, 1.95996)]
    expected = np.quantile(means_R, [normal.cdf(bias + z / (1 - acceleration * z)) for z in z])
    plain = np.quantile(means_R, [0.025, 0.975])
    found = interval_of_mean({"a": values_n}, None, 0)
    # Both ends lie higher than the percentiles; 10,000 resamples blur an end by about 0.015.
    assert expected[0] - plain[0] > 0.09 and expected[1] - plain[1] > 0.15
    assert found == pytest.approx(tuple(expected), abs=0.045)


def test_equal_values_get_the_interval_that_any_distribution_allows():
    for value, low, high in ((1.0, 0.05**0.1, 1.0), (0.0, 0.0, 1 - 0.05**0.1), (0.5, 0.5 * 0.05**0.1, 1 - 0.5 * 0.05**0.1)):
        assert interval_of_mean({"a": np.full(10, value)}, UNIT, 0) == pytest.approx((low, high))
    assert interval_of_mean({"a": np.array([1.0])}, UNIT, 0) == pytest.approx((0.05, 1.0))
    assert interval_of_mean({"a": np.full(10, 2.5)}, None, 0) is None


def test_equal_values_of_several_tasks_bound_their_average_together():
    perfect = {"a": np.ones(20), "b": np.ones(30)}
    assert interval_of_mean(perfect, UNIT, 0) == pytest.approx((0.05 ** (1 / 40), 1.0))
    # A task tells nothing about another that scores differently: each has its own bound.
    low, high = interval_of_mean({"a": np.ones(20), "b": np.zeros(20)}, UNIT, 0)
    assert (low, high) == pytest.approx((0.5 * 0.05 ** (1 / 20), 1 - 0.5 * 0.05 ** (1 / 20)))


def test_interval_depends_on_seed_and_name_and_nothing_else():
    values_n = np.random.default_rng(0).random(40)
    first = interval_of_mean({"a": values_n}, UNIT, 3)
    assert interval_of_mean({"a": values_n}, UNIT, 3) == first
    assert interval_of_mean({"a": values_n}, UNIT, 4) != first
    assert interval_of_mean({"b": values_n}, UNIT, 3) != first
    assert interval_of_mean({"a": values_n, "b": values_n}, UNIT, 3) == interval_of_mean({"b": values_n, "a": values_n}, UNIT, 3)


def test_average_weighs_tasks_equally_and_resamples_within_a_task():
    few, many = np.array([0.0, 1.0] * 5), np.zeros(1000)
    many[:100] = 1.0
    strata = {"few": few, "many": many}
    assert stratified_mean(strata) == pytest.approx((0.5 + 0.1) / 2)
    low, high = interval_of_mean(strata, UNIT, 0)
    error = math.sqrt(few.var() / 10 + many.var() / 1000) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize("differences", [[0.3, -0.1, 0.25, 0.4, 0.05, 0.2], [0.5, 0.25, -0.25, 0.75, 0.0, 0.0, 1.0]])
def test_p_value_of_few_differences_is_the_count_over_all_sign_patterns(differences):
    sums = [sum(s * d for s, d in zip(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    expected = np.mean([abs(total) >= abs(sum(differences)) - 1e-12 for total in sums])
    assert sign_flip_p_value(np.array(differences), 0) == pytest.approx(expected)


@pytest.mark.parametrize(("wins", "losses"), [(5, 1), (60, 41), (3, 3), (0, 4), (400, 300)])
def test_p_value_of_binary_scores_is_that_of_mcnemars_exact_test(wins, losses):
    differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 50) / 7
    # The probability that a fair coin gives an outcome at most as likely as this one.
    chances = [math.comb(wins + losses, heads) / 2 ** (wins + losses) for heads in range(wins + losses + 1)]
    expected = sum(chance for chance in chances if chance <= chances[wins] * (1 + 1e-9))
    assert sign_flip_p_value(differences, 0) == pytest.approx(expected)


def test_p_value_of_drawn_sign_patterns_is_near_the_normal_approximation_and_never_zero():
    differences = np.random.default_rng(1).normal(0.1, 1.0, size=300)
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert sign_flip_p_value(differences, 0) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.015)
    assert sign_flip_p_value(np.random.default_rng(1).normal(9.0, 1.0, size=300), 0) == 1 / 20_001
    assert sign_flip_p_value(np.zeros(5), 0) == 1.0


def test_p_values_are_evenly_spread_where_there_is_no_difference():
    rng = np.random.default_rng(2)
    found = [sign_flip_p_value(rng.normal(size=12), 0) for _ in range(1000)]
    # The bounds are four standard deviations of 1,000 draws at 5 % and 50 %.
    assert 0.022 < np.mean(np.array(found) <= 0.05) < 0.078
    assert 0.437 < np.mean(np.array(found) <= 0.5) < 0.563


def test_holm_corrects_step_by_step_and_keeps_the_order():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.9, 0.5]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_interval_of_a_paired_difference_is_narrower_than_that_of_a_run():
    rng = np.random.default_rng(3)
    first = rng.random(200)
    second = np.clip(first + 0.02 + 0.01 * rng.normal(size=200), 0, 1)
    test = paired_test({"a": first}, {"a": second}, UNIT, 0)
    assert test.num_pairs == 200
    assert test.difference == pytest.approx(test.second - test.first)
    low, high = interval_of_mean({"a": first}, UNIT, 0)
    assert test.interval[1] - test.interval[0] < 0.1 * (high - low)
    assert test.interval[0] > 0 and test.p_value == 1 / 20_001
    same = paired_test({"a": first}, {"a": first}, UNIT, 0)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.interval == pytest.approx((-(1 - 0.05 ** (1 / 200)), 1 - 0.05 ** (1 / 200)))
