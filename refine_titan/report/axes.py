"""Axes of charts: they end at the data, and their ticks are round numbers in between."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """The range of an axis and the values that have a tick, all within the range. `low` < `high`; both above 0 if `is_log`."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high end; values outside lie at the ends."""
        warp = math.log2 if self.is_log else float
        low, high, value = warp(self.low), warp(self.high), warp(min(max(value, self.low), self.high))
        return (value - low) / (high - low)


def axis_over(values: Iterable[float], count: int = 5, with_zero: bool = False) -> Axis:
    """Makes an axis from the smallest to the largest of the values (and 0, if `with_zero`), with about `count` ticks."""
    found = [*values, *([0.0] if with_zero else [])] or [0.0]
    low, high = min(found), max(found)
    if not high > low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) * 0.05, high + abs(high) * 0.05)
    return Axis(low, high, ticks_within(low, high, count))


def step_axis(first: float, last: float, count: int = 5) -> Axis:
    """Makes an axis of steps or positions, which are whole numbers, as are its ticks."""
    if last <= first:
        return Axis(first - 1, first + 1, [first])
    return Axis(first, last, ticks_within(first, last, count, whole=True))


def axis_of(values: Sequence[float]) -> Axis:
    """Makes a logarithmic axis with a tick at each of the values, which are sorted and above 0."""
    low, high = values[0], values[-1]
    return Axis(low, high, values, is_log=True) if high > low else Axis(low / 2, high * 2, values, is_log=True)


def ticks_within(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` multiples of a round number from `low` to `high`, at least two unless only one whole number lies there."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * factor for factor in (10, 5, 2.5, 2, 1, 0.5, 0.25, 0.2, 0.1)]
    for step in [step for step in steps if not whole or step == round(step)] or [1.0]:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
        if len(ticks) >= 2 and (len(ticks) >= count - 1 or step <= raw):
            break
    return ticks


def axis_label(value: float) -> str:
    """Formats a number for an axis: `0.25`, `1,200`, or `16K` for a multiple of 1024."""
    if value >= 1024 and value % 1024 == 0:
        return f"{int(value // 1024)}K"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.10g}"
