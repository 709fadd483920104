"""What is counted of each sequence, and the measures that are made of it."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

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


def terms_of(sequences: Sequence[SequenceSums]) -> dict[str, int]:
    """How many tokens, positions or rollouts each measure is the mean of, in the order in which the names first come."""
    names = dict.fromkeys(name for sequence in sequences for name in sequence.counts)
    return {name: sum(sequence.counts.get(name, 0) for sequence in sequences) for name in names}


def measures_of(sequences: Sequence[SequenceSums]) -> dict[str, float]:
    """The mean of every measure over all terms of all sequences."""
    terms = terms_of(sequences)
    return {name: math.fsum(sequence.sums.get(name, 0.0) for sequence in sequences) / terms[name] for name in terms}


def bins(num_positions: int) -> list[tuple[int, int]]:
    """Bins of positions in a document, as (first position, position after the last): 0 to 256, 256 to 512, 512 to 1024, and so on."""
    found, end = [(0, FIRST_BIN)], FIRST_BIN
    while end < num_positions:
        found.append((end, 2 * end))
        end *= 2
    return found
