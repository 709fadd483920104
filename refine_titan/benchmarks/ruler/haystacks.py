"""Makes essay haystacks, the text that needles are hidden in: the user's essays, or a built-in substitute for them."""

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from refine_titan.data.data_files import refuse_large
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

ESSAY_SUFFIXES = (".txt", ".md")

# Longer sentences (tables, code, scripts without full stops) are cut, so that a haystack can grow in small steps.
MAX_SENTENCE_WORDS = 40
MAX_SENTENCE_CHARACTERS = 300

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


class Essays(Protocol):
    """Any number of sentences in a fixed order."""

    identity: str
    """Equal for two haystacks if and only if their text is."""

    note: str
    """Origin of the text, for the reader of a result."""

    def sentences(self, count: int) -> list[str]:
        """The first `count` sentences."""
        ...

    def repeats_at(self, count: int) -> bool:
        """Whether the first `count` sentences include a repetition because the text is shorter."""
        ...


class FolderEssays:
    """The text files of a folder in the order of their paths, repeated from the start when they end."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"essay_folder is {str(folder)!r}: no such folder; empty takes the built-in substitute for essays")
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in ESSAY_SUFFIXES)
        if not paths:
            raise UserError(f"essay_folder: {folder} holds no file ending in {' or '.join(ESSAY_SUFFIXES)}")
        self._sentences = [sentence for path in paths for sentence in split_sentences(_read(path))]
        if not self._sentences:
            raise UserError(f"essay_folder: the {len(paths)} files of {folder} hold no text")
        text = "\n".join(self._sentences)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.note = f"haystack: essays of {folder} ({len(text.split()):,} words, sha256 {self.identity[:16]})"

    def sentences(self, count: int) -> list[str]:
        repeats = -(-count // len(self._sentences))
        return (self._sentences * repeats)[:count]

    def repeats_at(self, count: int) -> bool:
        return count > len(self._sentences)


class SubstituteEssays:
    """Unlimited English-like sentences without meaning, from a small grammar; the same on every machine."""

    identity = "built-in substitute 1"
    note = "haystack: built-in substitute for essays"

    def __init__(self):
        self._rng = random.Random(derive_seed(0, "substitute essays"))
        self._sentences: list[str] = []

    def sentences(self, count: int) -> list[str]:
        while len(self._sentences) < count:
            self._sentences.append(_sentence(self._rng))
        return self._sentences[:count]

    def repeats_at(self, count: int) -> bool:
        return False


@functools.lru_cache(maxsize=4)
def load_essays(essay_folder: str) -> Essays:
    """Loads the essays of a folder; an empty name gives the built-in substitute."""
    return FolderEssays(Path(essay_folder).expanduser()) if essay_folder else SubstituteEssays()


def split_sentences(text: str) -> list[str]:
    """Splits text into sentences of at most `MAX_SENTENCE_WORDS` words and `MAX_SENTENCE_CHARACTERS`, with single spaces."""
    sentences = []
    for sentence in _SENTENCE_END.split(text):
        piece: list[str] = []
        characters = 0
        for word in _words(sentence):
            if len(piece) == MAX_SENTENCE_WORDS or (piece and characters + len(word) > MAX_SENTENCE_CHARACTERS):
                sentences.append(" ".join(piece))
                piece, characters = [], 0
            piece.append(word)
            characters += len(word) + 1
        if piece:
            sentences.append(" ".join(piece))
    return sentences


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        for start in range(0, len(word), MAX_SENTENCE_CHARACTERS):
            yield word[start : start + MAX_SENTENCE_CHARACTERS]


def _read(path: Path) -> str:
    try:
        refuse_large(path, path.stat().st_size)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"essay_folder: {path} is not UTF-8") from error
    except OSError as error:
        raise UserError(f"essay_folder: {path} cannot be read: {error.strerror}") from error


_CLAUSES = (
    "{the} {noun} {verb} {place}",
    "{the} {adjective} {noun} {verb} {place}",
    "{the} {noun} of {the} {noun} {verb} {when}",
    "{person} {thought} that {the} {noun} was {degree} {adjective}",
    "{person} {thought} that {the} {noun} would be {adjective} {when}",
    "there was {a} {noun} {place}, and nobody {thought} it was {adjective}",
    "{when} {the} {noun} {verb} {place}",
    "it took {number} {units} to carry {the} {noun} {place}",
    "what {person} wanted from {the} {noun} was {a} {noun}",
    "{a} {adjective} {noun} is worth more than {number} {adjective} ones",
    "{person} bought {a} {noun} for {number} coins and gave it away {when}",
    "you cannot learn about {the} {noun} without {a} {noun}",
    "{number} {units} later {the} {noun} {verb} {place}",
    "the difference between {a} {noun} and {a} {noun} is that one of them {verb} {when}",
    "people who work with {a} {noun} tend to be {adjective}",
    "in {a} {adjective} year {the} {noun} {verb} twice",
)
_JOINTS = (", and ", ", but ", "; ", ", because ", ", although ", ", so ", " while ", ", which is why ", " until ")
_OPENINGS = (
    "",
    "",
    "",
    "",
    "As it happened, ",
    "Most of the time, ",
    "In the end, ",
    "Still, ",
    "For example, ",
    "To be fair, ",
    "Years ago, ",
    "On the other hand, ",
    "By all accounts, ",
    "At first, ",
)
_CHOICES = {
    "verb": (
        "stood",
        "disappeared",
        "arrived",
        "was sold",
        "changed",
        "fell",
        "was kept",
        "slept",
        "was repaired",
        "went unnoticed",
        "was painted",
        "turned up",
        "was counted",
        "waited",
        "returned",
        "was forgotten",
        "moved",
        "caught fire",
        "was drawn",
        "grew",
        "shrank",
        "was lent to a friend",
        "was explained",
        "made no sound",
    ),
    "place": (
        "near the station",
        "behind the school",
        "in the old part of town",
        "under the stairs",
        "at the end of the road",
        "beside the water",
        "on the second floor",
        "across the square",
        "outside the walls",
        "in the north",
        "among the trees",
        "between two houses",
        "at the market",
        "in the back of the shop",
        "on the way home",
        "over the hills",
    ),
    "when": (
        "in the evening",
        "before dawn",
        "after the rain",
        "every spring",
        "once a week",
        "during the war",
        "on Sundays",
        "late in the year",
        "for a while",
        "at noon",
        "as soon as it could",
        "without warning",
        "from time to time",
        "when nobody was looking",
        "long after that",
        "in those days",
    ),
    "person": (
        "my aunt",
        "the man next door",
        "a friend of ours",
        "the older of the two",
        "her teacher",
        "everyone in the village",
        "the owner",
        "one of the students",
        "his daughter",
        "a traveller",
        "the clerk",
        "the woman at the desk",
        "our host",
        "the first visitor",
        "their neighbour",
        "some of us",
    ),
    "thought": ("said", "thought", "knew", "believed", "noticed", "wrote", "insisted", "remembered", "doubted", "found"),
    "degree": ("rather", "quite", "never", "hardly", "too", "almost", "plainly", "always", "not very", "more or less"),
    "number": ("two", "three", "four", "five", "six", "seven", "nine", "ten", "a dozen", "twenty", "thirty", "forty"),
    "units": ("days", "weeks", "months", "years", "hours", "people", "attempts", "seasons"),
    "the": ("the", "the", "the", "this", "that", "her", "his", "their", "our", "every"),
    "adjective": ADJECTIVES,
    "noun": NOUNS,
}


def _sentence(rng: random.Random) -> str:
    text = rng.choice(_CLAUSES)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        text += rng.choice(_JOINTS) + rng.choice(_CLAUSES)
    text = re.sub(r"\{(\w+)\}", lambda slot: _fill(rng, slot.group(1)), text)
    text = rng.choice(_OPENINGS) + re.sub(r"\bA_ (\w)", _article, text)
    return text[0].upper() + text[1:] + "."


def _fill(rng: random.Random, kind: str) -> str:
    return "A_" if kind == "a" else rng.choice(_CHOICES[kind])


def _article(found: re.Match) -> str:
    return ("an " if found.group(1) in "aeiou" else "a ") + found.group(1)
