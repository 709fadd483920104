"""A deterministic retrieval corpus: keys and values hidden in a repeated line, asked for at the end, in RULER's words."""

import random
from collections.abc import Iterator

from refine_titan.data.needles import INTRODUCTION, NEEDLE, NOISE, QUESTION
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

# Far fewer than there are keys, so that drawing different ones for a document stays quick.
MOST_NEEDLES = 10_000
MOST_DRAWS = 20
_INTRODUCTION = INTRODUCTION.format(kind="number") + "\n"
_FILLER = NOISE + "\n"


class RetrievalCorpus:
    """Documents of at least `num_tokens` tokens, all answers within the first `num_tokens`.

    With one needle, a document without its last lines is a prompt of RULER's `niah_single_1` with its answer.
    """

    def __init__(self, tokenizer, num_tokens: int, num_needles: int, seed: int):
        if num_needles > MOST_NEEDLES:
            raise UserError(f"data.synthetic_needles is {num_needles}; allowed: 1 to {MOST_NEEDLES}")
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.num_needles = num_needles
        self.seed = seed
        self.filler_tokens = len(tokenizer.encode(_FILLER))

    def document(self, index: int) -> str:
        """Document `index`: the same text on every machine.

        Raises:
            UserError: if needles and questions alone are longer than a document.
        """
        for rng in self._draws("synthetic", index):
            needles = self._needles(rng)
            questions = [f"{_question(key)} {value}.\n" for key, value in needles]
            rng.shuffle(questions)
            text = self._haystack(rng, needles, "".join(questions))
            if text:
                # The last filler line takes the document past num_tokens, so that cutting it there loses no answer.
                return text + "".join(questions) + _FILLER * 2
        raise self._no_room()

    def question(self, index: int) -> tuple[str, str]:
        """Prompt `index` of at most `num_tokens` tokens, which asks for one of the values, and that value.

        Raises:
            UserError: if needles and question alone are longer than that.
        """
        for rng in self._draws("synthetic question", index):
            needles = self._needles(rng)
            key, value = rng.choice(needles)
            text = self._haystack(rng, needles, _question(key))
            if text:
                return text + _question(key), f"{value}."
        raise self._no_room()

    def _draws(self, purpose: str, index: int) -> Iterator[random.Random]:
        """Generators for one document, tried in order: a rare one's words are too long where those of nearly all leave room."""
        for attempt in range(MOST_DRAWS):
            yield random.Random(derive_seed(self.seed, purpose, index, *([attempt] if attempt else [])))

    def _no_room(self) -> UserError:
        return UserError(
            f"data.synthetic_needles = {self.num_needles} leaves no room for filler in {self.num_tokens} tokens; "
            "use fewer needles or a longer training.seq_len"
        )

    def _needles(self, rng: random.Random) -> list[tuple[str, str]]:
        """Keys, none of them twice, and their values."""
        values: dict[str, str] = {}
        while len(values) < self.num_needles:
            values[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"] = str(rng.randrange(10**6, 10**7))
        return list(values.items())

    def _haystack(self, rng: random.Random, needles: list[tuple[str, str]], end: str) -> str:
        """The introduction, and filler with the needles between its lines, as much as leaves room for `end`; nothing if none does."""
        hidden = [NEEDLE.format(kind="numbers", key=key, value=value) + "\n" for key, value in needles]
        room = self.num_tokens - len(self.tokenizer.encode(_INTRODUCTION + "".join(hidden) + end))
        num_filler = room // self.filler_tokens
        if num_filler < 1:
            return ""
        lines = [_FILLER] * num_filler
        for needle in hidden:
            lines.insert(rng.randrange(len(lines) + 1), needle)
        return _INTRODUCTION + "".join(lines)


def _question(key: str) -> str:
    return QUESTION.format(kind="number", key=key)
