"""The tokenizer of bytes as files that Hugging Face's libraries and vLLM read: ids 0 to 255 are bytes, 256 ends a text.

Byte-pair encoding without pairs, over GPT-2's letters for bytes. Those libraries know tokens by their text: where a text spells
END_OF_TEXT out, they read the one token, and `data.tokenizer.ByteTokenizer` reads its bytes.
"""

import json
from pathlib import Path
from typing import Any

from refine_titan.conversion.description import json_bytes
from refine_titan.errors import UserError
from refine_titan.models.hf_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from refine_titan.models.model_config import read_json

END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 256


def byte_letters() -> list[str]:
    """The letter of each byte: itself where it is printable in Latin-1, else the next of the letters from U+0100 on (GPT-2's mapping)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer_files() -> dict[str, bytes]:
    """The tokenizer's files by name."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT_ID, "content": END_OF_TEXT, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
    return {TOKENIZER_FILE: json_bytes(tokenizer), TOKENIZER_CONFIG_FILE: json_bytes(config)}


def holds_byte_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer of a folder is the one of bytes, as this file or a library that loaded it has written it."""
    if not (folder / TOKENIZER_FILE).is_file():
        return False
    try:
        return _essence(read_json(folder / TOKENIZER_FILE)) == _essence(json.loads(byte_tokenizer_files()[TOKENIZER_FILE]))
    except (UserError, AttributeError, TypeError, KeyError):
        return False  # whoever loads the tokenizer says what is wrong with it


def _essence(tokenizer: dict[str, Any]) -> list[Any]:
    """What decides which ids a text gets."""
    model, before = tokenizer["model"], tokenizer["pre_tokenizer"]
    added = [(token["id"], token["content"]) for token in tokenizer["added_tokens"]]
    vocabulary = {token: i for token, i in model["vocab"].items() if token != END_OF_TEXT}
    steps = [before["type"], before["add_prefix_space"], before["use_regex"], tokenizer["normalizer"]]
    return [model["type"], vocabulary, model["merges"], added, steps]
