"""Needle in a haystack: a long text hides values, each under a key, and the question asks for some of them."""

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from refine_titan.benchmarks.ruler.drafts import Draft, cycle_words, insert_at_depths
from refine_titan.benchmarks.ruler.haystacks import Essays
from refine_titan.data.needles import INTRODUCTION, INTRODUCTION_TO_SEVERAL, NEEDLE, NOISE, QUESTION, QUESTION_FOR_SEVERAL
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.seeding import derive_seed

DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))


@dataclass(frozen=True)
class Variant:
    """One NIAH task: the haystack's material, the kinds of keys and values, and the number of needles."""

    haystack: Literal["noise", "essays", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    values_per_key: int = 1
    num_queries: int = 1


VARIANTS = {
    "niah_single_1": Variant("noise"),
    "niah_single_2": Variant("essays"),
    "niah_single_3": Variant("essays", values="uuids"),
    "niah_multikey_1": Variant("essays", num_keys=4),
    "niah_multikey_2": Variant("needles"),
    "niah_multikey_3": Variant("needles", keys="uuids", values="uuids"),
    "niah_multiquery": Variant("essays", num_keys=4, num_queries=4),
    "niah_multivalue": Variant("essays", values_per_key=4),
}


def draft(task: str, rng: random.Random, depth: float, essays: Essays) -> Draft:
    """Drafts a sample of a NIAH task. `essays` are read only if the task's haystack consists of essays.

    Args:
        depth: position of the needle asked for, one of `DEPTHS`. Tasks that ask for several values draw their depths instead.
    """
    variant = VARIANTS[task]
    asks_one = variant.num_queries * variant.values_per_key == 1
    source = _Needles(variant, rng)
    needles = [source.draw(variant.values_per_key) for _ in range(variant.num_keys)]
    queries = needles[: variant.num_queries]
    answers = tuple(value for _, values in queries for value in values)
    lines = [source.line(key, value) for key, values in needles for value in values]
    if asks_one:  # the first needle is the one asked for
        depths = [depth, *rng.sample([other for other in DEPTHS if other != depth], len(lines) - 1)]
    else:
        depths = rng.sample(DEPTHS, len(lines))
    placed = list(zip(depths, lines))
    asked = _enumerate([key for key, _ in queries])
    if asks_one:
        introduction, question, kind = INTRODUCTION, QUESTION, variant.values.removesuffix("s")
    else:
        introduction, question, kind = INTRODUCTION_TO_SEVERAL, QUESTION_FOR_SEVERAL, variant.values

    def prompt(units: int, filler: int) -> str:
        match variant.haystack:
            case "noise":
                sentences, separator = [NOISE] * units, "\n"
            case "essays":
                sentences, separator = essays.sentences(units), " "
            case "needles":
                sentences, separator = source.distractors(units), "\n"
        context = separator.join(insert_at_depths(sentences, placed))
        if filler:
            context += separator + cycle_words(NOISE, filler)
        return f"{introduction.format(kind=kind)}\n{context}\n{question.format(kind=kind, key=asked)}"

    return Draft(
        prompt,
        answers,
        response=f" {_enumerate(answers)}.",
        max_new_tokens=128,
        min_units=3 if variant.haystack == "needles" else 1,
        max_units=200_000 if variant.haystack == "needles" else 1 << 24,
        depth=depth if asks_one else None,
        essays=essays if variant.haystack == "essays" else None,
    )


class _Needles:
    """Draws keys and values without repetition."""

    def __init__(self, variant: Variant, rng: random.Random):
        self.variant = variant
        self.rng = rng
        self.used: set[str] = set()
        # Distractors have their own generator, so that the number of them does not change the needles.
        self.distractor_rng = random.Random(derive_seed(rng.getrandbits(63), "distractors"))
        self.lines: list[str] = []

    def draw(self, num_values: int) -> tuple[str, list[str]]:
        key = self._unused(self.rng, self.variant.keys)
        return key, [self._unused(self.rng, self.variant.values) for _ in range(num_values)]

    def line(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.variant.values, key=key, value=value)

    def distractors(self, count: int) -> list[str]:
        """First `count` needles that the question does not ask for."""
        while len(self.lines) < count:
            key = self._unused(self.distractor_rng, self.variant.keys)
            self.lines.append(self.line(key, self._unused(self.distractor_rng, self.variant.values)))
        return self.lines[:count]

    def _unused(self, rng: random.Random, kind: str) -> str:
        while (word := _draw(rng, kind)) in self.used:
            pass
        self.used.add(word)
        return word


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _enumerate(words: list[str] | tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
