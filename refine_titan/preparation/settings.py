"""The settings that decide the content of prepared data, and recipes: settings for published data sets, by name."""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from refine_titan.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
LARGEST = 2**31 - 1  # lengths are stored as 32-bit integers
# About how many bytes of input a process takes at a time.
UNIT_BYTES = 1 << 24


def _setting(default: Any, description: str, choices: tuple[str, ...] = (), least: int = 0) -> Any:
    return field(default=default, metadata={"help": description, "choices": choices, "least": least})


@dataclass(frozen=True)
class Settings:
    """The settings on which the output depends, besides inputs and tokenizer. Each field is a command-line flag, with its help."""

    kind: str = _setting("documents", "documents: text to train on; questions: prompts with answers", ("documents", "questions"))
    text_column: str = _setting("text", "column of the text (documents)")
    prompt_column: str = _setting("prompt", "column of the prompt (questions)")
    answers_column: str = _setting("", "column of the answers, a list or a text (questions); default: answers, or answer")
    suffixes: tuple[str, ...] = _setting(SUFFIXES, "endings of the files read from folders; .gz and .zst may follow")
    files: str = _setting("*", "which files of folders are read: a pattern of the path in the folder, such as '*train*'")
    min_bytes: int = _setting(0, "documents of fewer UTF-8 bytes are dropped without being tokenized")
    min_tokens: int = _setting(1, "documents, or prompts, of fewer tokens are dropped", least=1)
    max_tokens: int = _setting(
        0, "documents: length at which longer ones are truncated or split; questions: most tokens of prompt plus answer; 0: no limit"
    )
    long_documents: str = _setting(
        "keep",
        "documents above --max-tokens: kept whole, split into documents of that length, or truncated to it",
        ("keep", "split", "truncate"),
    )
    answer_tokens: int = _setting(32, "tokens of --max-tokens that prompts leave to the answer (questions)", least=1)
    deduplicate: str = _setting("none", "exact: if rows of any files have the same content, only the first is kept", ("exact", "none"))
    shard_tokens: int = _setting(100_000_000, "most tokens of a shard, unless a single document is longer", least=1)
    seed: int | None = _setting(None, "seed by which all documents are shuffled; default: no shuffling, the order of the input")

    def __post_init__(self):
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"{flag(item.name)} is {value!r}; allowed: {', '.join(choices)}")
            if isinstance(value, int) and item.name != "seed" and not item.metadata["least"] <= value <= LARGEST:
                raise UserError(f"{flag(item.name)} is {value}; allowed: {item.metadata['least']} to {LARGEST}")
        allowed = TABLE_SUFFIXES if self.kind == "questions" else SUFFIXES
        if not self.suffixes or not all(re.fullmatch(r"\.[^.A-Z]+", suffix) for suffix in self.suffixes):
            found = " ".join(self.suffixes) or "empty"
            raise UserError(f"--suffixes is {found}; allowed: {', '.join(allowed)}, and others of text files, in lower case with their dot")
        if self.kind == "questions":
            self._check_questions()
        else:
            self._check_documents()

    def _check_questions(self) -> None:
        if self.long_documents != "keep":
            raise UserError(f"--long-documents is {self.long_documents!r}; questions are never cut, allowed: keep")
        if self.min_bytes:
            raise UserError(f"--min-bytes is {self.min_bytes}; it is for documents, allowed with --kind questions: 0")
        if self.max_tokens and self.max_tokens < self.answer_tokens + self.min_tokens:
            raise UserError(
                f"--max-tokens is {self.max_tokens}; it has to hold --answer-tokens ({self.answer_tokens}) and a prompt of "
                f"--min-tokens ({self.min_tokens})"
            )

    def _check_documents(self) -> None:
        if self.long_documents == "keep" and self.max_tokens:
            raise UserError(
                f"--max-tokens is {self.max_tokens} and --long-documents keep, which cuts nothing; choose --long-documents "
                "truncate or split, or leave --max-tokens out"
            )
        if self.long_documents != "keep" and not self.max_tokens:
            raise UserError(f"--long-documents {self.long_documents} needs --max-tokens")
        if self.long_documents == "split" and self.min_tokens > self.max_tokens:
            raise UserError(
                f"--min-tokens is {self.min_tokens}; with --long-documents split allowed: at most --max-tokens, {self.max_tokens}"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as the manifest stores them."""
        return asdict(self) | {"suffixes": list(self.suffixes)}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Recipe:
    """Settings for one published data set.

    Attributes:
        purpose: the training that the result is for.
        download: which data set to download, and how; the tool itself downloads nothing.
        settings: the settings that differ from the defaults; flags override them.
    """

    purpose: str
    download: str
    settings: dict[str, Any]


def _ruler_questions(name: str) -> Recipe:
    return Recipe(
        f"post-training on RULER {name}: prompts of at most 16,384 - 32 tokens with their answers, as they are",
        "git clone https://github.com/princetonvisualai/ReFINE; --input is its data/ruler, where it has files named train "
        "(columns prompt, answer). Else make them with https://github.com/NVIDIA/RULER, whose files need --prompt-column input "
        "--answers-column outputs. Shorter prompts: --max-tokens 4096 or 8192",
        {
            "kind": "questions",
            "suffixes": TABLE_SUFFIXES,
            "files": f"*{name.lower()}*train*",
            "max_tokens": 16384,
            "answer_tokens": 32,
        },
    )


RECIPES = {
    "slimpajama-6b": Recipe(
        "mid-training: documents of at least 16,384 tokens, truncated to that",
        "hf download DKYoon/SlimPajama-6B --repo-type dataset --local-dir FOLDER; --input is that FOLDER "
        "(https://huggingface.co/datasets/DKYoon/SlimPajama-6B, 48 parquet files, 14 GB)",
        {
            "suffixes": (".parquet",),
            "files": "*train*",
            "min_bytes": 16384,
            "min_tokens": 16384,
            "max_tokens": 16384,
            "long_documents": "truncate",
            "deduplicate": "exact",
        },
    ),
    "ruler-squadqa": _ruler_questions("SQuADQA"),
    "ruler-hotpotqa": _ruler_questions("HotpotQA"),
}


def resolve_settings(recipe: str | None, overrides: dict[str, Any]) -> Settings:
    """The settings of a recipe, or the defaults, with overrides.

    Raises:
        UserError: the recipe is unknown, or settings are out of range or contradict each other.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"--recipe is {recipe!r}; allowed: {', '.join(RECIPES)}")
    return Settings(**(RECIPES[recipe].settings if recipe else {}) | overrides)


def describe_recipes() -> str:
    """Describes all recipes for people."""
    lines = []
    for name, recipe in RECIPES.items():
        lines += [name, f"  for       {recipe.purpose}", f"  download  {recipe.download}"]
        lines += [f"  {flag(key):<18} {_readable(value)}" for key, value in recipe.settings.items()] + [""]
    return "\n".join(lines).rstrip()


def _readable(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
