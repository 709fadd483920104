"""Mean over independent repetitions of an experiment (training seeds), with its interval by Student's t distribution.

The bootstrap of `statistics.py` covers the choice of an evaluation's samples. This interval covers the training too: each
repetition has its own seed for training and evaluation, so its score varies with everything that is random.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` repetitions, half the width of its confidence interval, and the two-sided p value for a true mean of 0.

    Width and p value are None for a single repetition.
    """

    n: int
    mean: float
    half_width: float | None
    p_value: float | None


def estimate(values_n: np.ndarray, level: float = LEVEL) -> Estimate:
    """Estimates the mean of values `[n]` that are independent and roughly normally distributed.

    Args:
        level: confidence of the interval. With 1 - (1 - LEVEL) / m for each of m means, all m intervals together hold with
            confidence LEVEL (Bonferroni).
    """
    n, mean = len(values_n), float(np.mean(values_n))
    if n < 2:
        return Estimate(n, mean, None, None)
    error = float(np.std(values_n, ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * max(abs(mean), 1e-300):  # equal values differ by rounding
        return Estimate(n, mean, 0.0, 1.0 if mean == 0 else 0.0)
    p_value = 2 * (1 - student_t_cdf(abs(mean) / error, n - 1))
    return Estimate(n, mean, error * student_t_quantile((1 + level) / 2, n - 1), p_value)


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for whole degrees of freedom, by the finite series in theta = atan(t / sqrt(degrees)).

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(degrees))
    if degrees % 2:
        term, total = math.cos(theta), math.cos(theta) if degrees > 1 else 0.0
        for i in range(3, degrees - 1, 2):
            term *= math.cos(theta) ** 2 * (i - 1) / i
            total += term
        within = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        term = total = 1.0
        for i in range(2, degrees - 1, 2):
            term *= math.cos(theta) ** 2 * (i - 1) / i
            total += term
        within = math.sin(theta) * total
    return 0.5 + within / 2  # `within` is P(|T| <= t), with the sign of t


def student_t_quantile(probability: float, degrees: int) -> float:
    """Finds the t with P(T <= t) = `probability`, which must be at least 0.5, by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2
