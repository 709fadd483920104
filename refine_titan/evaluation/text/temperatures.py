"""The loss at the temperature that suits a model best: what is left when its confidence is put right.

A training that only makes a model surer or less sure of itself changes the loss, and the share of right tokens among sampled ones, as
another temperature does. It does not change the loss at the best temperature. Source: temperature scaling, arXiv 1706.04599.
"""

import numpy as np

# Temperatures at which the loss is measured, besides 1.
TEMPERATURES = (0.8, 0.9, 1.1, 1.25)


def best_temperature(losses: dict[float, float]) -> tuple[float, float]:
    """The temperature with the least loss, and that loss, by the losses at some temperatures.

    The loss is convex in the inverse temperature: the least one lies by the parabola through the lowest of the given losses and its two
    neighbours. It is the lowest one itself where that is the first or the last, or not finite.
    """
    inverse_m = 1 / np.array(sorted(losses))
    loss_m = np.array([losses[temperature] for temperature in sorted(losses)])
    lowest = int(np.argmin(loss_m))
    if lowest in (0, len(loss_m) - 1) or not np.isfinite(loss_m).all():
        return float(1 / inverse_m[lowest]), float(loss_m[lowest])
    around = slice(lowest - 1, lowest + 2)
    a, b, c = np.polyfit(inverse_m[around] - inverse_m[lowest], loss_m[around], 2)
    step = -b / (2 * a)
    return float(1 / (inverse_m[lowest] + step)), float(c + b * step / 2)
