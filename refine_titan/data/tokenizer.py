"""Tokenizers: Hugging Face's `tokenizer.json`, and bytes."""

import hashlib

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from refine_titan.errors import UserError
from refine_titan.job_config import JobConfig
from refine_titan.models.sizes import resolve_flavor


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte (ids 0..255) and an end-of-text token (256)."""

    def __init__(self):
        super().__init__()
        self.eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: list[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary do too."""
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace") + "\ufffd" * sum(
            i > 256 for i in token_ids
        )

    def get_vocab_size(self) -> int:
        return 257


class PlainHuggingFaceTokenizer(HuggingFaceTokenizer):
    """torchtitan's wrapper, encoding without BOS, EOS or a template: documents are told apart by `cu_seqlens`."""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def tokenizer_sha256(tokenizer: BaseTokenizer) -> str:
    """The hash of the whole `tokenizer.json`, as loaded; for bytes, of their name."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return hashlib.sha256(tokenizer.tokenizer.to_str().encode()).hexdigest()
    if isinstance(tokenizer, ByteTokenizer):
        return hashlib.sha256(b"bytes").hexdigest()
    raise TypeError(f"a tokenizer of {type(tokenizer).__name__} has no known definition to hash")


def build_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    """The tokenizer of `model.hf_assets_path`, or bytes if it is empty.

    Raises:
        UserError: if the folder's `tokenizer.json` cannot be read, or has ids that the model does not embed.
    """
    path, model = job_config.model.hf_assets_path, job_config.model
    if not path:
        tokenizer, largest_id = ByteTokenizer(), ByteTokenizer().get_vocab_size() - 1
    else:
        try:
            tokenizer = PlainHuggingFaceTokenizer(path)
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise UserError(f"model.hf_assets_path: {path}/tokenizer.json cannot be read: {error}") from error
        largest_id = max(tokenizer.get_vocab().values(), default=-1)
    vocab_size = resolve_flavor(model.name, model.flavor).vocab_size
    if largest_id >= vocab_size:
        raise UserError(
            f"the tokenizer of {path or 'bytes'} has ids up to {largest_id}, but {model.name} {model.flavor} embeds only "
            f"{vocab_size}: choose another model.flavor or model.hf_assets_path"
        )
    return tokenizer
