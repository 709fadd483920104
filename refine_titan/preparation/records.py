"""Converts one row of the input into records of the output, or finds the reason why there are none."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.data.chat import ChatTemplate
from refine_titan.data.question_rows import question_row
from refine_titan.data.rows import text_row
from refine_titan.data.tokenizer import largest_token_id
from refine_titan.preparation.settings import Settings

HASH_BYTES = 16


@dataclass
class Record:
    """A row of the output, and the bookkeeping that is needed until it is written.

    Attributes:
        content_hash: hash of the row of the input from which the record was made.
        piece: index of the record among the pieces of its document.
        num_tokens: number of its tokens; of a question, prompt and first answer.
        columns: the values of the output's columns.
    """

    content_hash: bytes
    piece: int
    num_tokens: int
    columns: dict[str, Any]


@dataclass
class Converted:
    """The result for one row.

    Attributes:
        records: records to keep.
        skip_reason: why there are none, if there are none.
        tokens_read: number of tokens that tokenizing the row gave.
    """

    records: list[Record]
    skip_reason: str = ""
    tokens_read: int = 0


class DocumentConverter:
    """Tokenizes documents, and cuts and filters them as `refine_titan.data.documents.DocumentStream` does."""

    def __init__(self, settings: Settings, tokenizer: BaseTokenizer):
        self.settings = settings
        self.tokenizer = tokenizer
        self.token_type = np.dtype(np.uint16 if largest_token_id(tokenizer) < 2**16 else np.uint32)

    @property
    def schema(self) -> pyarrow.Schema:
        """Columns of a shard."""
        tokens = pyarrow.list_(pyarrow.from_numpy_dtype(self.token_type))
        return pyarrow.schema([("tokens", tokens), ("num_tokens", pyarrow.uint32()), ("source", pyarrow.string())])

    def convert(self, source: str, values: list[Any]) -> Converted:
        """Converts a row to the pieces of its document."""
        row = text_row(values[0])
        if row.text is None:
            return Converted([], row.skip_reason)
        content, settings = row.text.encode("utf-8"), self.settings
        if len(content) < settings.min_bytes:
            return Converted([], f"under {settings.min_bytes} bytes")
        tokens = np.array(self.tokenizer.encode(row.text), dtype=self.token_type)
        if len(tokens) < settings.min_tokens:
            return Converted([], "too short", len(tokens))
        content_hash = hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        pieces = self._cut(tokens)
        length = settings.max_tokens
        records = [
            Record(
                content_hash,
                i,
                len(piece),
                {
                    "tokens": piece,
                    "num_tokens": len(piece),
                    "source": f"{source}+{i * length}" if i else source,
                },
            )
            for i, piece in enumerate(pieces)
        ]
        return Converted(records, "", len(tokens))

    def _cut(self, tokens: np.ndarray) -> list[np.ndarray]:
        settings = self.settings
        if settings.long_documents == "keep":
            return [tokens]
        if settings.long_documents == "truncate":
            return [tokens[: settings.max_tokens]]
        pieces = [tokens[i : i + settings.max_tokens] for i in range(0, len(tokens), settings.max_tokens)]
        if len(pieces) > 1 and len(pieces[-1]) < settings.min_tokens:
            pieces.pop()
        return pieces


class QuestionConverter:
    """Keeps prompts and answers as text, with their numbers of tokens."""

    def __init__(self, settings: Settings, tokenizer: BaseTokenizer):
        self.settings = settings
        self.tokenizer = tokenizer
        self.chat = ChatTemplate.of_tokenizer(tokenizer)

    @property
    def schema(self) -> pyarrow.Schema:
        """Columns of a shard; `answer_tokens` is the length of `answers[0]`."""
        counts = [("prompt_tokens", pyarrow.uint32()), ("answer_tokens", pyarrow.uint32())]
        return pyarrow.schema(
            [("prompt", pyarrow.string()), ("answers", pyarrow.list_(pyarrow.string())), *counts, ("source", pyarrow.string())]
        )

    def convert(self, source: str, values: list[Any]) -> Converted:
        """Converts a row to a question."""
        prompt = question_row(*values, chat=self.chat)
        if prompt.text is None:
            return Converted([], prompt.skip_reason)
        answers, settings = list(prompt.answers), self.settings
        prompt_tokens, answer_tokens = len(self.tokenizer.encode(prompt.text)), len(self.tokenizer.encode(answers[0]))
        read = prompt_tokens + answer_tokens
        if answer_tokens == 0:
            return Converted([], "answer without tokens", read)
        if prompt_tokens < settings.min_tokens:
            return Converted([], "too short prompt", read)
        if settings.max_tokens and prompt_tokens > settings.max_tokens - settings.answer_tokens:
            return Converted([], f"prompt of over {settings.max_tokens - settings.answer_tokens} tokens", read)
        content = json.dumps([prompt.text, answers]).encode("utf-8")
        columns = {
            "prompt": prompt.text,
            "answers": answers,
            "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens,
            "source": source,
        }
        content_hash = hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        return Converted([Record(content_hash, 0, read, columns)], "", read)


def build_converter(settings: Settings, tokenizer: BaseTokenizer) -> DocumentConverter | QuestionConverter:
    """The converter of `settings.kind`."""
    return (DocumentConverter if settings.kind == "documents" else QuestionConverter)(settings, tokenizer)


def record_table(records: list[Record], schema: pyarrow.Schema) -> pyarrow.Table:
    """Makes a table of `schema` from records."""
    arrays = []
    for item in schema:
        values = [record.columns[item.name] for record in records]
        if item.name == "tokens":
            offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in values])]).astype(np.int32)
            arrays.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(values))))
        else:
            arrays.append(pyarrow.array(values, type=item.type))
    return pyarrow.Table.from_arrays(arrays, schema=schema)
