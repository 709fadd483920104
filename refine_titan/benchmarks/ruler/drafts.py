"""Defines a draft: a RULER sample before the search for its length, and the helpers that several tasks share."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from refine_titan.benchmarks.ruler.haystacks import Essays

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Draft:
    """A sample whose haystack has no length yet.

    A haystack grows in units: sentences, lines or words, depending on the task.

    Attributes:
        prompt: makes the prompt from a number of units of haystack and a number of words of filler after them.
        answers: right answers.
        response: response that a perfect model would give.
        max_new_tokens: RULER's token budget for the answer.
        min_units: fewest units with which the task keeps its meaning.
        max_units: most units that the task can make.
        depth: position of the needle asked for, from 0 to 1; None if there is not exactly one.
        notes: deviations from RULER that the length made necessary.
        essays: essays whose sentences are the units; None if the units are something else.
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
    """Inserts each needle after its share of the units: depth 0 is before the first unit, depth 1 after the last."""
    result, begin = [], 0
    for depth, needle in sorted(needles):
        end = int(depth * len(units))
        result += units[begin:end]
        result.append(needle)
        begin = end
    return result + units[begin:]


def cycle_words(text: str, count: int) -> str:
    """First `count` words of the text, which is repeated as often as needed."""
    return " ".join(itertools.islice(itertools.cycle(text.split()), count))
