"""Tokenizers: Hugging Face's `tokenizer.json`, and one token per byte."""

import hashlib

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.sizes import resolve_args


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte (ids 0..255) and an end-of-text token (256)."""

    def __init__(self):
        super().__init__()
        self.eos_id = 256

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
        super().__init__(tokenizer_path)
        # A tokenizer.json may hold a length limit from the program that saved it, which would cut documents silently.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_tokenizer(folder: str, setting: str) -> BaseTokenizer:
    """Loads the tokenizer of a Hugging Face folder, or bytes if `folder` is empty.

    Args:
        setting: the setting or flag that names the folder, for the error message.

    Raises:
        UserError: the folder's `tokenizer.json` cannot be read.
    """
    if not folder:
        return ByteTokenizer()
    try:
        return PlainHuggingFaceTokenizer(folder)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise UserError(f"{setting}: {folder}/tokenizer.json cannot be read: {error}") from error


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
        UserError: the folder's `tokenizer.json` cannot be read, or has ids that the model does not embed.
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
