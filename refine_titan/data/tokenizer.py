"""Tokenizers: Hugging Face's `tokenizer.json` or GPT-2's `vocab.json` with `merges.txt`, and one token per byte."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from refine_titan.config.sections import JobConfig
from refine_titan.conversion.byte_tokenizer import END_OF_TEXT_ID, holds_byte_tokenizer
from refine_titan.conversion.description import has_tokenizer
from refine_titan.data.end_of_sequence import stated_ids
from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.limits import MAX_EXPANSION, check_small_file
from refine_titan.models.hf_files import ASSETS, TOKENIZER_FILE, TOKENIZER_PARTS
from refine_titan.models.model_config import read_json
from refine_titan.models.sizes import resolve_args

# Files of a folder that torchtitan's wrapper opens.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte (ids 0..255) and an end-of-text token (256). `conversion/byte_tokenizer.py` writes it as files."""

    def __init__(self):
        super().__init__()
        self.eos_id = END_OF_TEXT_ID

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: list[int]) -> str:
        """Decodes ids to text. Bytes that are not UTF-8 and ids outside the vocabulary become U+FFFD."""
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace") + "\ufffd" * sum(i > 256 for i in token_ids)

    def get_vocab_size(self) -> int:
        return 257


class PlainHuggingFaceTokenizer(HuggingFaceTokenizer):
    """torchtitan's wrapper, without BOS, EOS or a template: `cu_seqlens` separates documents."""

    def __init__(self, tokenizer_path: str):
        """
        Raises:
            UserError: a file is too large, no regular file, or asks for more text than MAX_EXPANSION allows.
        """
        _check_files(Path(tokenizer_path))
        super().__init__(tokenizer_path)
        for name, part in (("normalizer", self.tokenizer.normalizer), ("decoder", self.tokenizer.decoder)):
            if part is not None and _growth(json.loads(part.__getstate__())) > MAX_EXPANSION.value:
                raise UserError(
                    f"the {name} of the tokenizer in {tokenizer_path} makes more than {MAX_EXPANSION.value:,} characters of one; allowed: "
                    f"{MAX_EXPANSION.words()}"
                )
        # A tokenizer.json may hold a length limit from the program that saved it, which would cut documents silently.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # torchtitan 0.2.2 finds no end-of-sequence token if the beginning-of-sequence token is the same, as that of GPT-2.
        self.eos_id = next(iter(stated_ids(Path(tokenizer_path), self)), None)

    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Tokenizer:
        """Reads the files. torchtitan 0.2.2 drops merges that begin with `#`, and takes a vocabulary without merges for words."""
        if Path(tokenizer_path, TOKENIZER_FILE).is_file():
            return super()._load_tokenizer_from_path(tokenizer_path)
        vocabulary, merges = BPE.read_file(*(str(Path(tokenizer_path, name)) for name in TOKENIZER_PARTS))
        _check_merges(vocabulary, merges, Path(tokenizer_path, TOKENIZER_PARTS[1]))
        config = self._load_config(str(Path(tokenizer_path, "tokenizer_config.json"))) or {}
        tokenizer = Tokenizer(BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _load_config(self, config_path: str) -> dict | None:
        return read_json(Path(config_path)) if Path(config_path).is_file() else None

    def encode(self, text: str) -> list[int]:
        with self._named_failures():
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        with self._named_failures():
            return super().decode(token_ids)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not is_failure_of_tokenizers(error):
                raise
            raise UserError(f"the tokenizer in {self.tokenizer_path} fails: {error}") from error


def _check_files(folder: Path) -> None:
    """Raises UserError if a file that is read is too large or no regular file."""
    for path in (folder / name for name in TOKENIZER_FILES):
        if path.exists():
            check_small_file(path)


def is_failure_of_tokenizers(error: BaseException) -> bool:
    """Whether an exception is one of the library tokenizers: a bare Exception, or a panic of its Rust code, which is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _growth(part: dict[str, Any]) -> float:
    """How many characters a normalizer or decoder makes of one at most, counting its replacements."""
    inner = part.get("normalizers") or part.get("decoders")
    if inner:
        return math.prod(map(_growth, inner))
    if part.get("type") != "Replace":
        return 1
    pattern, content = part["pattern"], part["content"]
    return max(1, len(content) / max(1, len(pattern["String"])) if "String" in pattern else 1 + len(content))


def _check_merges(vocabulary: dict[str, int], merges: list[tuple[str, str]], path: Path) -> None:
    """Raises UserError if many tokens of several characters come from no merge, as only special tokens do: the list of merges is cut."""
    made = {"".join(pair) for pair in merges}
    long = [token for token in vocabulary if len(token) > 1]
    lost = [token for token in long if token not in made]
    if len(lost) > len(long) // 10 + 16:
        raise UserError(f"{path} makes {len(long) - len(lost)} of the {len(long)} tokens of several characters; it is not whole")


def load_tokenizer(folder: str, setting: str) -> BaseTokenizer:
    """Loads the tokenizer of a Hugging Face folder; that of bytes if `folder` is empty, or if the folder holds it.

    Args:
        setting: the setting or flag that names the folder, for the error message.

    Raises:
        UserError: the folder holds no tokenizer, or one that cannot be read.
    """
    if not folder:
        return ByteTokenizer()
    try:
        _check_files(Path(folder))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    if not has_tokenizer(Path(folder)):
        raise UserError(f"{setting} is {folder!r}, which holds neither {TOKENIZER_FILE} nor {' with '.join(TOKENIZER_PARTS)}")
    if holds_byte_tokenizer(Path(folder)):
        return ByteTokenizer()
    name = TOKENIZER_FILE if Path(folder, TOKENIZER_FILE).is_file() else " with ".join(TOKENIZER_PARTS)
    try:
        for asset in ASSETS:
            if Path(folder, asset).is_file():
                refuse_lfs_pointer(Path(folder, asset))
        return PlainHuggingFaceTokenizer(folder)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except BaseException as error:
        # A file that is malformed raises whatever torchtitan's wrapper and the library raise.
        if not isinstance(error, Exception) and not is_failure_of_tokenizers(error):
            raise
        raise UserError(f"{setting}: {folder}/{name} cannot be read: {error}") from error


def largest_token_id(tokenizer: BaseTokenizer) -> int:
    """The largest id that the tokenizer can return; -1 if its vocabulary is empty."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return max(tokenizer.get_vocab().values(), default=-1)
    return tokenizer.get_vocab_size() - 1


def tokenizer_sha256(tokenizer: BaseTokenizer) -> str:
    """SHA-256 of everything that decides which tokens a text gets.

    A Hugging Face tokenizer is hashed as it is used, with the special tokens that `tokenizer_config.json` adds, in the serialisation
    of the `tokenizers` package.
    """
    serialised = tokenizer.tokenizer.to_str() if isinstance(tokenizer, HuggingFaceTokenizer) else "one token per UTF-8 byte"
    return hashlib.sha256(serialised.encode("utf-8")).hexdigest()


def build_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    """Builds the tokenizer of `model.hf_assets_path`, or bytes if the path is empty.

    Raises:
        UserError: the tokenizer cannot be read, or has ids that the model does not embed.
    """
    path, model = job_config.model.hf_assets_path, job_config.model
    tokenizer = load_tokenizer(path, "model.hf_assets_path")
    largest_id = largest_token_id(tokenizer)
    vocab_size = resolve_args(model).vocab_size
    if largest_id >= vocab_size:
        raise UserError(
            f"the tokenizer of {path or 'bytes'} has ids up to {largest_id}, but {model.name} {model.flavor} embeds only "
            f"{vocab_size}: choose another model.flavor or model.hf_assets_path"
        )
    return tokenizer
