"""Finds the tokens that end an answer. Any of the files beside a model may name them, and no single one names all."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.errors import UserError
from refine_titan.models.model_config import CONFIG_FILE, read_json

# Files that name ids, and files that name tokens.
ID_FILES = ("generation_config.json", CONFIG_FILE)
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def end_of_sequence_ids(tokenizer: BaseTokenizer, folders: Iterable[Path | str]) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's own first, then those that files of the folders name, in the files' order.

    Raises:
        UserError: a file cannot be read, or names something that is no id or token.
    """
    found = {} if tokenizer.eos_id is None else {tokenizer.eos_id: None}
    for folder in folders:
        found |= dict.fromkeys(stated_ids(Path(folder), tokenizer))
    return tuple(found)


def stated_ids(folder: Path, tokenizer: BaseTokenizer) -> list[int]:
    """The end-of-sequence ids that the files of a folder name; tokens that the tokenizer does not have are left out."""
    found = []
    for name in TOKEN_FILES:
        if (folder / name).is_file():
            token = stated_token(read_json(folder / name), folder / name)
            token_id = tokenizer.token_to_id(token) if token is not None and hasattr(tokenizer, "token_to_id") else None
            found += [] if token_id is None else [token_id]
    for name in ID_FILES:
        if (folder / name).is_file():
            values = read_json(folder / name)
            text_model = values.get("text_config")
            for part in (values, text_model if isinstance(text_model, dict) else {}):
                found += _ids(part.get("eos_token_id"), folder / name)
    return list(dict.fromkeys(found))


def stated_token(values: dict[str, Any], path: Path) -> str | None:
    """The `eos_token` of a tokenizer's file, which is a text or an object that holds it; None for none."""
    token = values.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"{path}: eos_token is {token!r:.80}; allowed: a text, or an object with its content")
    return token


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for found in ids:
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise UserError(f"{path}: eos_token_id is {value!r:.80}; allowed: a whole number from 0, a list of such numbers, or null")
    return ids
