"""A deterministic retrieval corpus in RULER's words: keys and values hidden between repeated lines, with questions at the end."""

import random
from collections.abc import Iterator

from refine_titan.data.needles import INTRODUCTION, NEEDLE, NOISE, QUESTION
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

# Far fewer than there are keys, so that different keys for a document are drawn quickly.
MAX_NEEDLES = 10_000
MAX_DRAWS = 20
_INTRODUCTION = INTRODUCTION.format(kind="number") + "\n"
_FILLER = NOISE + "\n"


class RetrievalCorpus:
    """Documents of at least `num_tokens` tokens, whose first `num_tokens` tokens contain all answers.

    With one needle, a document without its last lines is a prompt of RULER's `niah_single_1` followed by its answer.
    """

    def __init__(self, tokenizer, num_tokens: int, num_needles: int, seed: int):
        if num_needles > MAX_NEEDLES:
            raise UserError(f"data.synthetic_needles is {num_needles}; allowed: 1 to {MAX_NEEDLES}")
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.num_needles = num_needles
        self.seed = seed
        self.filler_tokens = len(tokenizer.encode(_FILLER))

    def document(self, index: int) -> str:
        """Document `index`, the same text on every machine.

        Raises:
            UserError: needles and questions alone are longer than a document.
        """
        for rng in self._draws("synthetic", index):
            needles = self._needles(rng)
            questions = [f"{_question(key)} {value}.\n" for key, value in needles]
            rng.shuffle(questions)
            text = self._haystack(rng, needles, "".join(questions))
            if text:
                # Filler at the end makes the document longer than num_tokens, so that cutting it there removes no answer.
                return text + "".join(questions) + _FILLER * 2
        raise self._no_room()

    def question(self, index: int) -> tuple[str, str]:
        """Prompt `index`, of at most `num_tokens` tokens, which asks for one of the values; and that value.

        Raises:
            UserError: needles and question alone are longer than `num_tokens`.
        """
        for rng in self._draws("synthetic question", index):
            needles = self._needles(rng)
            key, value = rng.choice(needles)
            text = self._haystack(rng, needles, _question(key))
            if text:
                return text + _question(key), f"{value}."
        raise self._no_room()

    def _draws(self, purpose: str, index: int) -> Iterator[random.Random]:
        """Random generators for one document, to be tried in order: the words of a draw may be too long to leave room for filler."""
        for attempt in range(MAX_DRAWS):
            yield random.Random(derive_seed(self.seed, purpose, index, *([attempt] if attempt else [])))

    def _no_room(self) -> UserError:
        return UserError(
            f"data.synthetic_needles = {self.num_needles} leaves no room for filler in {self.num_tokens} tokens; "
            "use fewer needles or a longer training.seq_len"
        )

    def _needles(self, rng: random.Random) -> list[tuple[str, str]]:
        """Different keys, with their values."""
        values: dict[str, str] = {}
        while len(values) < self.num_needles:
            values[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"] = str(rng.randrange(10**6, 10**7))
        return list(values.items())

    def _haystack(self, rng: random.Random, needles: list[tuple[str, str]], end: str) -> str:
        """The introduction, and as many lines of filler as leave room for `end`, with the needles between them.

        Returns an empty text if there is no room for a line of filler.
        """
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
