"""An endless, sharded, shuffled stream of tokenized documents whose exact position is a small dictionary.

Nothing depends on how often random numbers were drawn: draw i of a rank's shuffle comes from (seed, rank, i). The
shuffle buffer is saved as addresses; on resume its documents are read and tokenized again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.data.sources import DocumentSource
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed


class DocumentAddress(NamedTuple):
    """Where a document comes from: file and row of the source, and which piece of a long document it is."""

    file: int
    row: int
    piece: int


@dataclass
class Document:
    address: DocumentAddress
    tokens: list[int]


class DocumentStream:
    """Documents of one data-parallel rank, for ever.

    Row number i of the source (counted over all files) belongs to rank i mod `num_ranks`. Rows without usable text and
    documents under `min_tokens` are skipped, counted by reason, and reported once per reason.
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
        rank: int,
        num_ranks: int,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.min_tokens = min_tokens
        self.split_long = split_long
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks

        self.epoch = 0
        self.draws = 0
        self.documents_read = 0
        self.skipped: dict[str, int] = {}
        self._buffer: list[Document] = []
        # Next row to read: file, row in it, and how many rows of the source lie before that file.
        self._file, self._row, self._rows_before = 0, self._first_row(0), 0
        self._pending: list[Document] = []
        self._rows: Iterator | None = None

    def next_document(self) -> Document:
        """The next document.

        Raises:
            UserError: if a whole pass over this rank's share of the source gives no document.
        """
        while len(self._buffer) < self.shuffle_buffer:
            self._buffer.append(self._read_document())
        index = derive_seed(self.seed, "shuffle", self.rank, self.draws) % len(self._buffer)
        self.draws += 1
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def document_at(self, address: DocumentAddress) -> Document:
        """Reads a document again by its address."""
        row = self.source.row(address.file, address.row)
        pieces = self._pieces(address.file, address.row, row.text) if row.text is not None else []
        for document in pieces:
            if document.address == address:
                return document
        raise UserError(
            f"{self.source.file_name(address.file)}, row {address.row}, has changed since the checkpoint was written: its "
            f"document {address.piece} is gone; restore the file, or start a new run"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable position."""
        return {
            "epoch": self.epoch,
            "draws": self.draws,
            "documents_read": self.documents_read,
            "skipped": dict(self.skipped),
            "cursor": [self._file, self._row, self._rows_before],
            "pending": [list(document.address) for document in self._pending],
            "buffer": [list(document.address) for document in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.draws = state["draws"]
        self.documents_read = state["documents_read"]
        self.skipped = dict(state["skipped"])
        self._file, self._row, self._rows_before = state["cursor"]
        self._rows = None
        self._pending = [self.document_at(DocumentAddress(*a)) for a in state["pending"]]
        self._buffer = [self.document_at(DocumentAddress(*a)) for a in state["buffer"]]

    def _read_document(self) -> Document:
        passes_begun = 0
        while not self._pending:
            found = self._next_row()
            if found is None:
                self.epoch += 1
                passes_begun += 1
                if passes_begun == 2:
                    raise UserError(self._nothing_found())
                continue
            file, row, content = found
            if content.text is None:
                self._skip(content.skip_reason, file, row)
                continue
            self._pending = self._pieces(file, row, content.text)
            if self._pending:
                self.documents_read += 1
            else:
                self._skip("too short", file, row)
        return self._pending.pop(0)

    def _next_row(self):
        """The next row of this rank as (file, row, content); None once at the end of each pass."""
        while self._file < self.source.num_files():
            if self._rows is None:
                self._rows = self.source.rows(self._file, self._row, self.num_ranks)
            for row, content in self._rows:
                self._row = row + self.num_ranks
                return self._file, row, content
            self._rows_before += self.source.num_rows(self._file)
            self._file += 1
            self._row = self._first_row(self._rows_before)
            self._rows = None
        self._file, self._row, self._rows_before, self._rows = 0, self._first_row(0), 0, None
        return None

    def _first_row(self, rows_before: int) -> int:
        """First row of a file that belongs to this rank, when `rows_before` rows of the source lie before the file."""
        return (self.rank - rows_before) % self.num_ranks

    def _pieces(self, file: int, row: int, text: str) -> list[Document]:
        tokens = self.tokenizer.encode(text)
        if len(tokens) < self.min_tokens:
            return []
        if not self.split_long:
            return [Document(DocumentAddress(file, row, 0), tokens[: self.seq_len])]
        pieces = [tokens[i : i + self.seq_len] for i in range(0, len(tokens), self.seq_len)]
        if len(pieces) > 1 and len(pieces[-1]) < self.min_tokens:
            pieces.pop()
        return [Document(DocumentAddress(file, row, i), piece) for i, piece in enumerate(pieces)]

    def _skip(self, reason: str, file: int, row: int) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if self.skipped[reason] == 1:
            logger.warning(
                f"Skipping documents ({reason}), first {self.source.file_name(file)} row {row}; "
                "the summary at the end of the run counts them"
            )

    def _nothing_found(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "none read"
        share = f" (rank {self.rank} of {self.num_ranks} reads every {self.num_ranks}th row)" if self.num_ranks > 1 else ""
        return (
            f"data.source holds no document of at least {self.min_tokens} tokens{share}; skipped: {counts}. "
            "Lower data.min_document_tokens or training.seq_len, or give another source"
        )
