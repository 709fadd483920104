"""Confidence intervals of mean scores, and tests of whether two runs on the same samples differ.

An average over tasks is a stratified mean: every task is a stratum of the same weight, whatever its number of samples, and
resampling stays within a stratum. Random draws depend on the seed and the stratum's name, not on the order of calls. So the
average of one task has exactly that task's interval.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from refine_titan.seeding import derive_seed

LEVEL = 0.95
RESAMPLES = 10_000
SIGN_FLIPS = 20_000
# Up to this many differences, all 2^n sign patterns are counted. Above it, SIGN_FLIPS patterns are drawn.
EXACT_DIFFERENCES = 16
# With so few distinct values, a resample draws the count of each value: the same distribution, about ten times as fast.
FEW_VALUES = 16
# Random indices drawn at once: 8 MiB.
BLOCK = 1 << 20

Bounds = tuple[float, float]
# Name of a stratum -> its values `[n]`, n >= 1.
Strata = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two runs on the same samples; the difference is second minus first."""

    num_pairs: int
    first: float
    second: float
    difference: float
    interval: Bounds | None
    p_value: float


def stratified_mean(strata: Strata) -> float:
    """Mean over strata of the mean within each."""
    return float(np.mean([values_n.mean() for values_n in strata.values()]))


def interval_of_mean(strata: Strata, bounds: Bounds | None, seed: int) -> Bounds | None:
    """Computes a 95 % confidence interval of `stratified_mean` by the BCa bootstrap (Efron 1987).

    If all values of every stratum are equal, a bootstrap interval has no width, and a perfect run of 5 samples would seem certain.
    Then the interval covers every distribution within `bounds` that fits the samples: after n equal values, other values have a
    probability of at most 1 - 0.05^(1/n) (about 3/n, the "rule of three").

    Args:
        bounds: smallest and largest possible value of a sample; None if unbounded.

    Returns:
        Low and high end; None if all values are equal and unbounded, which tells nothing.
    """
    # Values are compared with each other, not with their mean: the mean of equal floats differs from them by rounding.
    if all(np.all(values_n == values_n[0]) for values_n in strata.values()):
        return _interval_without_spread(strata.values(), bounds)
    means_R = np.mean([_resampled_means(values_n, seed, name) for name, values_n in strata.items()], axis=0)
    mean = stratified_mean(strata)
    # Ties count half: resampled means of few or binary values often equal the mean, up to rounding.
    tolerance = 1e-9 * max(abs(mean), float(means_R.std()))
    below = np.mean(means_R < mean - tolerance) + 0.5 * np.mean(np.abs(means_R - mean) <= tolerance)
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(float(below), 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    influence = np.concatenate([(values_n - values_n.mean()) / (len(strata) * len(values_n)) for values_n in strata.values()])
    acceleration = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))
    quantiles = []
    for side in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + normal.inv_cdf(side)
        quantiles.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means_R, quantiles)
    return float(min(low, mean)), float(max(high, mean))


def paired_test(first: Strata, second: Strata, bounds: Bounds | None, seed: int) -> PairedTest:
    """Compares the stratified means of two runs on the same samples.

    The p value is that of a permutation test: if the runs did not differ, each sample's difference would be as likely with the
    other sign.

    Args:
        first: values of one run.
        second: values of the other run for the same samples, in the same order.
        bounds: smallest and largest possible value of a sample; None if unbounded.
    """
    differences = {name: second[name] - values_n for name, values_n in first.items()}
    spread = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return PairedTest(
        num_pairs=sum(map(len, differences.values())),
        first=stratified_mean(first),
        second=stratified_mean(second),
        difference=stratified_mean(differences),
        interval=interval_of_mean(differences, spread, seed),
        p_value=sign_flip_p_value(np.concatenate([d_n / len(d_n) for d_n in differences.values()]), seed, *differences),
    )


def sign_flip_p_value(differences_n: np.ndarray, seed: int, *purpose: str) -> float:
    """Computes the two-sided p value: the share of sign patterns whose sum is at least as far from 0 as the observed sum.

    It is exact for up to 16 nonzero differences, and for any number of differences of equal size (for binary scores this is
    McNemar's exact test). Otherwise it comes from 20,000 drawn patterns and the observed one, and is at least 1/20,001.
    """
    sizes_m = np.abs(differences_n)
    is_zero = sizes_m <= 1e-12 * sizes_m.max(initial=0.0)
    observed = abs(float(differences_n[~is_zero].sum()))
    sizes_m = sizes_m[~is_zero]
    m = len(sizes_m)
    if m == 0:
        return 1.0
    # Sums that are equal in exact arithmetic differ by rounding.
    at_least = observed - 1e-9 * float(sizes_m.sum())
    if np.ptp(sizes_m) <= 1e-9 * sizes_m[0]:
        ahead = round((observed / sizes_m[0] + m) / 2)
        tail = sum(math.comb(m, k) for k in range(ahead, m + 1))
        return min(1.0, 2 * tail / 2**m)
    if m <= EXACT_DIFFERENCES:
        sums = np.zeros(1)
        for size in sizes_m:
            sums = np.concatenate([sums - size, sums + size])
        return float(np.mean(np.abs(sums) >= at_least))
    rng = np.random.default_rng(derive_seed(seed, "sign flips", *purpose))
    extreme = 0
    for num_draws in _blocks(SIGN_FLIPS, m):
        signs = rng.integers(0, 2, size=(num_draws, m), dtype=np.int8)
        extreme += int(np.count_nonzero(np.abs(2 * (signs @ sizes_m) - sizes_m.sum()) >= at_least))
    return (1 + extreme) / (1 + SIGN_FLIPS)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for testing all of them at once (Holm 1979), in the order given.

    If every adjusted p value below x is called significant, the probability of a false claim among them is at most x.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _resampled_means(values_n: np.ndarray, seed: int, name: str) -> np.ndarray:
    rng, n = np.random.default_rng(derive_seed(seed, "bootstrap", name)), len(values_n)
    distinct_u, counts_u = np.unique(values_n, return_counts=True)
    if len(distinct_u) <= FEW_VALUES:
        return rng.multinomial(n, counts_u / n, size=RESAMPLES) @ distinct_u / n
    return np.concatenate([values_n[rng.integers(0, n, size=(num_draws, n))].mean(axis=1) for num_draws in _blocks(RESAMPLES, n)])


def _blocks(num_draws: int, draw_size: int) -> list[int]:
    """Splits a number of draws into blocks that fit BLOCK."""
    size = max(1, BLOCK // draw_size)
    return [min(size, num_draws - begin) for begin in range(0, num_draws, size)]


def _interval_without_spread(strata: Collection[np.ndarray], bounds: Bounds | None) -> Bounds | None:
    if bounds is None:
        return None
    # If T strata of n samples have the same value, all T n samples together bound the probability of another value.
    num_pooled = len(strata) if len({values_n[0] for values_n in strata}) == 1 else 1
    smallest = min(map(len, strata))
    ends = []
    for values_n in strata:
        num_samples = num_pooled * smallest if num_pooled > 1 else len(values_n)
        share = (1 - LEVEL) ** (1 / num_samples)
        ends.append([share * values_n[0] + (1 - share) * bound for bound in bounds])
    low, high = np.mean(ends, axis=0)
    return float(low), float(high)
