"""An endless, sharded, shuffled stream of tokenized documents, whose exact position is a small dictionary.

Draw i of a stream's shuffle is a function of (seed, stream, i), so that no random generator has a state to save. The shuffle buffer is
saved as addresses; on resume its documents are read and tokenized again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.config.type_checks import in_toml
from refine_titan.data.holdout import HELD_OUT
from refine_titan.data.rows import DocumentSource, Row
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

# What is said of values that are kept as a hash.
_CHANGED = {
    "data.source": "data.source has other files, columns or content than when the checkpoint was written",
    "model.hf_assets_path": "model.hf_assets_path has a tokenizer that gives other tokens than when the checkpoint was written",
}
# What a position means that does not name a setting.
_WITHOUT = {"data.holdout_percent": 0.0}
# How a run goes on with other data.
BEGIN_ANEW = "pass --checkpoint.exclude_from_loading dataloader to start from the beginning of the data"


class DocumentAddress(NamedTuple):
    """Where a document comes from: file and row of the source, and the index of the piece if a long document is split."""

    file: int
    row: int
    piece: int


@dataclass
class Document:
    address: DocumentAddress
    tokens: list[int]


class DocumentStream:
    """One of `num_streams` shares of a source, read again and again.

    Row i of the source (counted over all files) belongs to stream i mod `num_streams`. Rows without usable text and documents of
    fewer than `min_tokens` tokens are skipped, counted by reason in the first pass, and reported once per reason.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: BaseTokenizer,
        *,
        seq_len: int,
        min_tokens: int,
        split_long: bool,
        shuffle_buffer: int,
        seed: int,
        number: int,
        num_streams: int,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.min_tokens = min_tokens
        self.split_long = split_long
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.number = number
        self.num_streams = num_streams

        # Computed now, so that a run that resumes notices if a file has grown or shrunk since.
        self.identity = self._compute_identity()
        self.epoch = 0
        self.draws = 0
        self.documents_read = 0
        self.skipped: dict[str, int] = {}
        self._buffer: list[Document] = []
        # Next row to read: file, row in it, and how many rows of the source lie before that file.
        self._file, self._row, self._rows_before = 0, self._first_row(0), 0
        self._pending: list[Document] = []
        self._rows: Iterator[tuple[int, Row]] | None = None
        # A source that gives no document in a whole pass never will.
        self._has_found_document = False

    def next_document(self) -> Document:
        """Draws the next document from the shuffle buffer, which it fills first.

        Raises:
            UserError: a whole pass over this share of the source gives no document.
        """
        while len(self._buffer) < self.shuffle_buffer:
            document = self._read_document()
            if document is not None:
                self._buffer.append(document)
            elif self._buffer:
                break  # the end of a pass: every document is drawn once before any is read again
            else:
                self._begin_next_pass()
        index = derive_seed(self.seed, "shuffle", self.number, self.draws) % len(self._buffer)
        self.draws += 1
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def documents_at(self, addresses: list[DocumentAddress]) -> list[Document]:
        """Reads documents again by their addresses. Every file is read once, every row tokenized once.

        Raises:
            UserError: a document is not there any more.
        """
        rows_of_file: dict[int, set[int]] = {}
        for address in addresses:
            rows_of_file.setdefault(address.file, set()).add(address.row)
        found: dict[DocumentAddress, Document] = {}
        for file, numbers in rows_of_file.items():
            for row, content in self.source.rows_again(file, numbers).items():
                found |= {document.address: document for document in self._pieces(file, row, self._tokens(content) or [])}
        for address in addresses:
            if address not in found:
                raise UserError(
                    f"data.source: {self.source.file_name(address.file)}, row {address.row}, has changed since the checkpoint "
                    "was written; restore it, or start a new run"
                )
        return [found[address] for address in addresses]

    def _compute_identity(self) -> dict[str, Any]:
        """Everything that gives a position its meaning, JSON-serialisable, by the setting that decides it."""
        sample = self.tokenizer.encode("The quick brown fox: 0123456789 naïve 漢字")
        return {
            "data.source": _digest(self.source.identity()),
            "model.hf_assets_path": _digest([self.tokenizer.get_vocab_size(), sample]),
            "training.seq_len": self.seq_len,
            "data.min_document_tokens": self.min_tokens,
            "data.long_documents": "split" if self.split_long else "truncate",
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.holdout_percent": self.source.holdout_percent,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        pending = self._pending[0].address if self._pending else None
        return {
            "identity": self.identity,
            "epoch": self.epoch,
            "draws": self.draws,
            "documents_read": self.documents_read,
            "skipped": dict(self.skipped),
            "cursor": [self._file, self._row, self._rows_before],
            "pending": pending,
            "buffer": [document.address for document in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Raises:
            UserError: the position belongs to other data, naming the setting that has changed.
        """
        self.check_identity(state)
        self.epoch = state["epoch"]
        self.draws = state["draws"]
        self.documents_read = state["documents_read"]
        self.skipped = dict(state["skipped"])
        self._file, self._row, self._rows_before = state["cursor"]
        self._rows = None
        self._has_found_document = True
        self._buffer = self.documents_at([DocumentAddress(*address) for address in state["buffer"]])
        self._pending = []
        if state["pending"] is not None:
            # The pending pieces are those of one row, from this one on.
            first = DocumentAddress(*state["pending"])
            self.documents_at([first])
            content = self.source.rows_again(first.file, {first.row})[first.row]
            self._pending = self._pieces(first.file, first.row, self._tokens(content))[first.piece :]

    def check_identity(self, state: dict[str, Any], way_out: str = BEGIN_ANEW) -> None:
        """Compares the data of a position with this stream's.

        Args:
            way_out: how to train on other data, for the error message.

        Raises:
            UserError: the position belongs to other data, naming the setting that has changed.
        """
        if "identity" not in state:
            raise UserError(
                f"the checkpoint's data position is of an earlier version, which did not write down what it belongs to; {way_out}"
            )
        for name, value in self.identity.items():
            before = state["identity"].get(name, _WITHOUT.get(name))
            if value != before:
                found = _CHANGED.get(name) or f"{name} is {in_toml(value)}, but was {in_toml(before)} when the checkpoint was written"
                raise UserError(f"{found}. Restore it, or {way_out}")

    def documents_of_pass(self) -> Iterator[Document]:
        """Yields the documents of the first pass in the order of the source.

        Raises:
            UserError: there are none.
        """
        while (document := self._read_document()) is not None:
            yield document
        if not self._has_found_document:
            raise UserError(self._nothing_found())

    def _begin_next_pass(self) -> None:
        if not self._has_found_document:
            raise UserError(self._nothing_found())
        self.epoch += 1
        self._file, self._row, self._rows_before, self._rows = 0, self._first_row(0), 0, None

    def _read_document(self) -> Document | None:
        """The next document of this pass in the order of the source; None at the end of the pass."""
        while not self._pending:
            found = self._next_row()
            if found is None:
                return None
            file, row, content = found
            tokens = self._tokens(content)
            if tokens is None:
                self._skip(self._skip_reason(content), file, row)
                continue
            self._pending = self._pieces(file, row, tokens)
            if not self._pending:
                self._skip("too short", file, row)
            elif self.epoch == 0:
                self.documents_read += 1
        self._has_found_document = True
        return self._pending.pop(0)

    def _next_row(self) -> tuple[int, int, Row] | None:
        """File, row and content of the next row of this share; None at the end of the pass."""
        while self._file < self.source.num_files():
            if self._rows is None:
                self._rows = self.source.rows(self._file, self._row, self.num_streams)
            for row, content in self._rows:
                self._row = row + self.num_streams
                return self._file, row, content
            self._rows_before += self.source.num_rows(self._file)
            self._file += 1
            self._row = self._first_row(self._rows_before)
            self._rows = None
        return None

    def _first_row(self, rows_before: int) -> int:
        """First row of a file that belongs to this share, if the files before it have `rows_before` rows."""
        return (self.number - rows_before) % self.num_streams

    def _skip_reason(self, content: Row) -> str:
        """Why `_tokens` returned None for a row."""
        return content.skip_reason

    def _tokens(self, content: Row) -> list[int] | None:
        """The tokens of a row, as stored or encoded from its text; None if the row is to be skipped."""
        if content.tokens is not None or content.text is None:
            return content.tokens
        return self.tokenizer.encode(content.text)

    def _pieces(self, file: int, row: int, tokens: list[int]) -> list[Document]:
        if len(tokens) < self.min_tokens:
            return []
        if not self.split_long:
            return [Document(DocumentAddress(file, row, 0), tokens[: self.seq_len])]
        pieces = [tokens[i : i + self.seq_len] for i in range(0, len(tokens), self.seq_len)]
        if len(pieces) > 1 and len(pieces[-1]) < self.min_tokens:
            pieces.pop()
        return [Document(DocumentAddress(file, row, i), piece) for i, piece in enumerate(pieces)]

    def _skip(self, reason: str, file: int, row: int) -> None:
        if self.epoch > 0:
            return
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if self.skipped[reason] == 1 and reason != HELD_OUT:  # which was asked for
            # The summary at the end of a run counts them.
            logger.warning(f"Skipping documents ({reason}): {self.source.file_name(file)} row {row}, ...")

    def _nothing_found(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "none read"
        share = f" (stream {self.number} of {self.num_streams} reads one row in {self.num_streams})" if self.num_streams > 1 else ""
        return f"data.source holds no document of at least {self.min_tokens} tokens{share}; skipped: {counts}. " + (
            "Lower data.min_document_tokens or training.seq_len, or give another source"
            if "too short" in self.skipped
            else "No row is too short: check data.text_column (data.prompt_column in post-training), or give another source"
        )


def _digest(values: list) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
