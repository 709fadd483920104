"""What is counted of each sequence, and the measures that are made of it."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from refine_titan.evaluation.text.temperatures import TEMPERATURES, best_temperature

# Width in tokens of the first bin of positions; each further one begins where the one before it ends and reaches twice as far.
FIRST_BIN = 256


class SequenceSums:
    """Sums over the tokens, positions or rollouts of one sequence, each with the number of its terms, by the name of the measure."""

    def __init__(self):
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds every element of a tensor on the CPU; none if it is empty."""
        if values.numel():
            self.sums[name] += float(values.double().sum())
            self.counts[name] += values.numel()


def loss_at(temperature: float) -> str:
    """Name of the sums of the loss at a temperature."""
    return f"loss_at_{temperature:g}"


AT_TEMPERATURES = frozenset(map(loss_at, TEMPERATURES))


def terms_of(sequences: Sequence[SequenceSums]) -> dict[str, int]:
    """How many tokens, positions or rollouts each measure is the mean of, in the order in which the names first come."""
    terms = _counts(sequences)
    shown = {name: number for name, number in terms.items() if name not in AT_TEMPERATURES}
    return shown | dict.fromkeys(("calibrated_loss", "best_temperature"), terms["loss"])


def measures_of(sequences: Sequence[SequenceSums]) -> dict[str, float]:
    """The mean of every measure over all terms of all sequences, and the loss at the best temperature, with that temperature."""
    terms = _counts(sequences)
    means = {name: math.fsum(sequence.sums.get(name, 0.0) for sequence in sequences) / terms[name] for name in terms}
    losses = {1.0: means["loss"]} | {temperature: means.pop(loss_at(temperature)) for temperature in TEMPERATURES}
    temperature, least = best_temperature(losses)
    return means | {"calibrated_loss": least, "best_temperature": temperature}


def _counts(sequences: Sequence[SequenceSums]) -> dict[str, int]:
    names = dict.fromkeys(name for sequence in sequences for name in sequence.counts)
    return {name: sum(sequence.counts.get(name, 0) for sequence in sequences) for name in names}


def bins(num_positions: int) -> list[tuple[int, int]]:
    """Bins of positions in a document, as (first position, position after the last): 0 to 256, 256 to 512, 512 to 1024, and so on."""
    found, end = [(0, FIRST_BIN)], FIRST_BIN
    while end < num_positions:
        found.append((end, 2 * end))
        end *= 2
    return found
