"""The loss at the temperature that suits a model best: what is left when its confidence is put right.

A training that only makes a model surer or less sure of itself changes the loss, and the share of right tokens among sampled ones, as
another temperature does. It does not change the loss at the best temperature. Source: temperature scaling, arXiv 1706.04599.
"""

import numpy as np

# Temperatures at which the loss is measured, besides 1.
TEMPERATURES = (0.7, 0.85, 1.15, 1.35, 1.6, 2.0)


def best_temperature(losses: dict[float, float]) -> tuple[float, float]:
    """The temperature with the least loss, and that loss, by the losses at some temperatures.

    The loss is convex in the inverse temperature: the least one lies by the parabola through the lowest of the given losses and its two
    neighbours. It is the lowest one itself where the parabola's lowest point is out of their range, or a loss is not finite.
    """
    inverse_m = 1 / np.array(sorted(losses))
    loss_m = np.array([losses[temperature] for temperature in sorted(losses)])
    lowest = int(np.argmin(loss_m))
    middle = min(max(lowest, 1), len(loss_m) - 2)
    if np.isfinite(loss_m).all():
        around = slice(middle - 1, middle + 2)
        a, b, c = np.polyfit(inverse_m[around] - inverse_m[middle], loss_m[around], 2)
        best = inverse_m[middle] - b / (2 * a) if a > 0 else np.inf
        if inverse_m[-1] <= best <= inverse_m[0]:
            return float(1 / best), float(c - b**2 / (4 * a))
    return float(1 / inverse_m[lowest]), float(loss_m[lowest])
