"""The contract between RULER's tasks and the search for their length."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from refine_titan.benchmarks.ruler.haystacks import Essays

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Draft:
    """A sample whose haystack has no length yet.

    Attributes:
        prompt: the prompt with so many units of haystack, then so many words of filler.
        answers: the references.
        response: what a model that knows everything would say.
        max_new_tokens: RULER's budget for the answer.
        min_units: haystack without which the task would be another one.
        max_units: haystack that there is.
        depth: where the needle asked for lies, 0 to 1.
        notes: deviations from RULER that the length made necessary.
        essays: the essays whose sentences are the units, if they are.
    """

    prompt: Callable[[int, int], str]
    answers: tuple[str, ...]
    response: str
    max_new_tokens: int
    min_units: int = 1
    max_units: int = 1 << 24
    depth: float | None = None
    notes: tuple[str, ...] = ()
    essays: Essays | None = None


def insert_at_depths(units: list[str], needles: list[tuple[float, str]]) -> list[str]:
    """The units with every needle after its share of them: depth 0 before the first, 1 after the last."""
    result, begin = [], 0
    for depth, needle in sorted(needles):
        end = int(depth * len(units))
        result += units[begin:end]
        result.append(needle)
        begin = end
    return result + units[begin:]


def cycle_words(text: str, count: int) -> str:
    """The first `count` words of the text, repeated as often as it takes."""
    return " ".join(itertools.islice(itertools.cycle(text.split()), count))
