"""Generates samples of RULER's synthetic tasks, each a function of (seed, task, length, index), the tokenizer and the essays."""

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from refine_titan.benchmarks.metrics import RULER_TASKS, check_task
from refine_titan.benchmarks.ruler import niah, variable_tracking, word_counts
from refine_titan.benchmarks.ruler.drafts import Draft
from refine_titan.benchmarks.ruler.fitting import LengthTooShort, largest_fitting
from refine_titan.benchmarks.ruler.haystacks import Essays, load_essays
from refine_titan.benchmarks.samples import Sample
from refine_titan.data.tokenizer import BaseTokenizer, tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.files.whole_files import remove_abandoned, write_atomically
from refine_titan.seeding import derive_seed

# Part of the cache's key. Raise it with every change that changes a prompt.
VERSION = 1
MAX_LENGTH = 1 << 22
# Least share of a length that prompt plus answer fill.
MIN_FILL = 0.98


@dataclass
class RulerGenerator:
    """Generates samples, or reads them from a cache of earlier calls.

    Attributes:
        tokenizer: counts a length's tokens, without BOS or EOS.
        seed: seed of every draw.
        essay_folder: folder of .txt and .md files for essay haystacks; empty takes the built-in substitute.
        cache_folder: keeps generated samples; None keeps none.
        notes: facts about the samples generated so far that a reader of the results must know.
    """

    tokenizer: BaseTokenizer
    seed: int
    essay_folder: str = ""
    cache_folder: Path | None = None
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self):
        self.essays: Essays = load_essays(self.essay_folder)
        self.tokenizer_sha256 = tokenizer_sha256(self.tokenizer)

    def sample(self, task: str, length: int, index: int) -> Sample:
        """Generates sample `index` of a task. Prompt plus answer fill at most `length` tokens, and at least the share `MIN_FILL`.

        Raises:
            UserError: if the task is unknown or cannot have the length.
        """
        check_task("ruler", task)
        if not 1 <= length <= MAX_LENGTH:
            raise UserError(f"lengths holds {length}; allowed: 1 to {MAX_LENGTH:,} tokens")
        path = self._cache_path(task, length, index)
        record = _read_record(path) if path else None
        if record is None:
            record = self._generate(task, length, index)
            if path:
                _write_record(path, record)
        self.notes |= dict.fromkeys(record["notes"])
        return Sample("ruler", task, index, record["prompt"], tuple(record["answers"]), record["max_new_tokens"], length, record["depth"])

    def _generate(self, task: str, length: int, index: int) -> dict:
        draft = self._draft(task, length, index)
        # With many tokens a word, as bytes have, the answer may need more than RULER's budget.
        max_new_tokens = max(draft.max_new_tokens, self._count(draft.response) + 1)
        budget = length - max_new_tokens
        try:
            units = largest_fitting(lambda n: self._count(draft.prompt(n, 0)), budget, draft.min_units, draft.max_units)
        except LengthTooShort as error:
            needed = error.tokens + max_new_tokens
            raise UserError(
                f"lengths holds {length}; sample {index} of ruler/{task} has at least {needed} tokens with this tokenizer; "
                f"allowed for the task: {shortest_length(needed)} and more"
            ) from error
        filler = 0
        if self._count(draft.prompt(units, 0)) + max_new_tokens < MIN_FILL * length:
            filler = largest_fitting(lambda n: self._count(draft.prompt(units, n)), budget, 0, budget)
        prompt = draft.prompt(units, filler)
        total = self._count(prompt) + max_new_tokens
        if not MIN_FILL * length <= total <= length:
            raise UserError(f"ruler/{task} cannot be brought to {length} tokens with this tokenizer, only to {total}")
        return {
            "prompt": prompt,
            "answers": list(draft.answers),
            "max_new_tokens": max_new_tokens,
            "depth": draft.depth,
            "notes": [*draft.notes, *_essay_notes(draft, units)],
        }

    def _draft(self, task: str, length: int, index: int) -> Draft:
        rng = random.Random(derive_seed(self.seed, "ruler", task, length, index))
        if task == "vt":
            return variable_tracking.draft(rng, length, self._count)
        if task == "cwe":
            return word_counts.draft_common_words(rng, length, self._count)
        if task == "fwe":
            return word_counts.draft_frequent_words(rng)
        return niah.draft(task, rng, self._depth(task, length, index), self.essays)

    def _depth(self, task: str, length: int, index: int) -> float:
        """Depth of a sample. Each block of 40 samples has each of the 40 depths once, in random order."""
        depths = list(niah.DEPTHS)
        block, place = divmod(index, len(depths))
        random.Random(derive_seed(self.seed, "ruler", task, length, "depths", block)).shuffle(depths)
        return depths[place]

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _cache_path(self, task: str, length: int, index: int) -> Path | None:
        if self.cache_folder is None:
            return None
        key = [VERSION, self.seed, task, length, self.tokenizer_sha256]
        if task in niah.VARIANTS and niah.VARIANTS[task].haystack == "essays":
            key += [self.essays.identity, self.essays.note]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return self.cache_folder / "ruler" / f"{task}_{length}_{digest}" / f"{index}.json"


def shortest_length(needed: int) -> int:
    """Length that fits every sample of a task if one sample needs `needed` tokens: a twentieth more, rounded up to a multiple of 64."""
    return -(-needed * 21 // 20 // 64) * 64


def _essay_notes(draft: Draft, units: int) -> list[str]:
    if draft.essays is None:
        return []
    return [draft.essays.note, *(["haystack: the essays are repeated to fill it"] if draft.essays.repeats_at(units) else [])]


def _write_record(path: Path, record: dict) -> None:
    text = json.dumps(record)
    try:
        remove_abandoned(path)
        write_atomically(path, json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "sample": text}))
    except OSError as error:
        raise UserError(f"{path}, which keeps a generated sample, cannot be written: {error.strerror}") from error


def _read_record(path: Path) -> dict | None:
    """Reads the record of an earlier call; None if there is none or the file is damaged."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(sealed["sample"].encode()).hexdigest() == sealed["sha256"]:
            return json.loads(sealed["sample"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    except OSError as error:
        raise UserError(f"{path}, which keeps a generated sample, cannot be read: {error.strerror}") from error
    return None


assert {*niah.VARIANTS, "vt", "cwe", "fwe"} == set(RULER_TASKS)
