"""Variable tracking: hides a chain of variable assignments in noise and asks for every variable that has the chain's value."""

import random
import string

from refine_titan.benchmarks.ruler.drafts import CountTokens, Draft, cycle_words, insert_at_depths
from refine_titan.data.needles import NOISE

HOPS = 4
QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the value "
    "{value}, they are:"
)


def draft(rng: random.Random, length: int, count_tokens: CountTokens) -> Draft:
    """Drafts a chain of `HOPS` hops after a worked example, which is left out if it takes more than a quarter of the length."""
    variables, placed, value = _chain(rng, letters=5)
    example_variables, example_placed, example_value = _chain(rng, letters=3)
    example = _question([NOISE] * 3, example_placed, example_value) + f" {' '.join(example_variables)}\n"
    notes = ()
    if count_tokens(example) > length / 4:
        example, notes = "", (f"vt at {length} tokens: without the worked example",)

    def prompt(units: int, filler: int) -> str:
        return example + _question([NOISE] * units, placed, value, cycle_words(NOISE, filler))

    return Draft(prompt, tuple(variables), response=f" {', '.join(variables)}", max_new_tokens=30, notes=notes)


def _chain(rng: random.Random, letters: int) -> tuple[list[str], list[tuple[float, str]], str]:
    """Draws the variables, their assignments with depths in the order of the chain, and the value."""
    variables: list[str] = []
    while len(variables) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in variables:
            variables.append(name)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in variables)]
    depths = sorted(rng.random() for _ in variables)
    return variables, [(d, f"VAR {name} = {source}") for d, name, source in zip(depths, variables, sources)], value


def _question(noise: list[str], placed: list[tuple[float, str]], value: str, filler: str = "") -> str:
    lines = insert_at_depths(noise, placed) + ([filler] if filler else [])
    return QUESTION.format(context="\n".join(lines), value=value, number=len(placed))
