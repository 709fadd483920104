"""Estimates over a few repetitions agree with tables of Student's t."""

import numpy as np
import pytest

from refine_titan.report.replicates import Estimate, estimate, student_t_cdf, student_t_quantile


@pytest.mark.parametrize("degrees, t", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(degrees, t):
    assert student_t_quantile(0.975, degrees) == pytest.approx(t, abs=5e-4)
    assert student_t_cdf(t, degrees) == pytest.approx(0.975, abs=1e-4)
    assert student_t_cdf(-t, degrees) == pytest.approx(0.025, abs=1e-4)


def test_estimate_of_three_values():
    found = estimate(np.array([1.0, 2.0, 6.0]))  # mean 3, variance 7
    assert found.n == 3 and found.mean == 3
    error = np.sqrt(7 / 3)
    assert found.half_width == pytest.approx(4.3027 * error, rel=1e-4)
    assert found.p_value == pytest.approx(0.1885, abs=1e-4)  # t = 1.964 with 2 degrees of freedom


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [estimate(values) for values in rng.normal(1.0, 2.0, size=(2000, 4))]
    assert np.mean([abs(e.mean - 1) <= e.half_width for e in found]) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval_and_equal_values_no_width():
    assert estimate(np.array([0.5])) == Estimate(1, 0.5, None, None)
    assert estimate(np.array([0.1] * 3)).half_width == 0 and estimate(np.array([0.1] * 3)).p_value == 0
    assert estimate(np.zeros(3)).p_value == 1


def test_intervals_of_several_means_are_wider():
    values = np.array([1.0, 2.0, 6.0, 3.0, 4.0])
    t_of_four = 4.3147  # Student's t at 1 - 0.05 / (2 * 4) with 4 degrees of freedom
    assert estimate(values, 1 - 0.05 / 4).half_width == pytest.approx(t_of_four * np.std(values, ddof=1) / np.sqrt(5), rel=1e-4)
