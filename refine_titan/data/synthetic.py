"""A deterministic retrieval corpus: keys and values hidden in repeated filler, asked for at the end."""

import random

from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ADJECTIVES = "amber brave calm dusty eager faint giant hollow icy jolly keen lucky mellow noble odd proud quiet rapid".split()
NOUNS = "anchor badger canyon drum ember falcon garden harbor island jacket kettle lantern meadow needle orchard".split()


class RetrievalCorpus:
    """Documents of at least `num_tokens` tokens, all answers within the first `num_tokens`."""

    def __init__(self, tokenizer, num_tokens: int, num_needles: int, seed: int):
        most = len(ADJECTIVES) * len(NOUNS)
        if num_needles > most:
            raise UserError(f"data.synthetic_needles is {num_needles}; allowed: 1 to {most}")
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.num_needles = num_needles
        self.seed = seed
        self.filler_tokens = len(tokenizer.encode(FILLER))

    def document(self, index: int) -> str:
        """Document `index`: the same text on every machine.

        Raises:
            UserError: if needles and questions alone are longer than a document.
        """
        rng = random.Random(derive_seed(self.seed, "synthetic", index))
        names, values = self._needles(rng)
        questions = [f"The special magic number for {key} is {value}.\n" for key, value in zip(names, values)]
        rng.shuffle(questions)
        lines = self._haystack(rng, names, values, "".join(questions))
        # The last filler line takes the document past num_tokens, so that cutting it there loses no answer.
        return "".join(lines) + "".join(questions) + FILLER * 2

    def question(self, index: int) -> tuple[str, str]:
        """Prompt `index` of at most `num_tokens` tokens, which asks for one of the values, and that value.

        Raises:
            UserError: if needles and question alone are longer than that.
        """
        rng = random.Random(derive_seed(self.seed, "synthetic question", index))
        names, values = self._needles(rng)
        asked = rng.randrange(len(names))
        question = f"The special magic number for {names[asked]} is"
        return "".join(self._haystack(rng, names, values, question)) + question, f"{values[asked]}."

    def _needles(self, rng: random.Random) -> tuple[list[str], list[str]]:
        names = rng.sample([f"{a} {n}" for a in ADJECTIVES for n in NOUNS], self.num_needles)
        return names, [str(rng.randrange(10**6, 10**7)) for _ in names]

    def _haystack(self, rng: random.Random, names: list[str], values: list[str], end: str) -> list[str]:
        """Lines of filler with the needles between them, as many as leave room for `end`."""
        needles = [f"One of the special magic numbers for {key} is: {value}.\n" for key, value in zip(names, values)]
        room = self.num_tokens - len(self.tokenizer.encode("".join(needles) + end))
        num_filler = room // self.filler_tokens
        if num_filler < 1:
            raise UserError(
                f"data.synthetic_needles = {self.num_needles} leaves no room for filler in {self.num_tokens} tokens; "
                "use fewer needles or a longer training.seq_len"
            )
        lines = [FILLER] * num_filler
        for needle in needles:
            lines.insert(rng.randrange(len(lines) + 1), needle)
        return lines
