"""Small sets of questions that tests make."""

import json
import random
from pathlib import Path

COLOURS = "red blue green black white brown".split()


def write_questions(path: Path, count: int = 24, shortest: int = 60, longest: int = 240, seed: int = 0) -> list[dict]:
    """A jsonl file of prompts of many lengths, each with the colour that it asks for among its answers."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        colour, length = draw.choice(COLOURS), draw.randrange(shortest, longest)
        ending = f" The box {i:03} is {colour}. What colour is the box {i:03}? Answer:"
        prompt = ("".join(draw.choices("abcdefgh ", k=length)) + ending)[-length:]
        rows.append({"prompt": prompt, "answers": [colour, f"it is {colour}"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
