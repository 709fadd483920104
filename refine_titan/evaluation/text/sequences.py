"""Draws the sequences that are measured: documents of a source in an order that the seed decides, packed as in training."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from refine_titan.data.documents import Document, DocumentStream
from refine_titan.data.epochs import shuffled
from refine_titan.data.packing import PackedSequence, SequencePacker
from refine_titan.data.rows import DocumentSource
from refine_titan.errors import UserError
from refine_titan.seeding import derive_seed

# Rows that are read together: a file is opened once for all of them.
ROWS_AT_ONCE = 64


class DrawnDocuments(DocumentStream):
    """The documents of a source, each once: in an order that depends on the seed, or in the source's own where no row is found at once."""

    def __init__(self, source: DocumentSource, tokenizer, *, seq_len: int, min_tokens: int, split_long: bool, seed: int):
        super().__init__(
            source,
            tokenizer,
            seq_len=seq_len,
            min_tokens=min_tokens,
            split_long=split_long,
            shuffle_buffer=1,
            seed=seed,
            number=0,
            num_streams=1,
        )
        in_order = source.why_in_order() is not None
        self._documents = iter(self._read_document, None) if in_order else self._in_drawn_order()

    def next_document(self) -> Document:
        """The next document.

        Raises:
            NoMoreDocuments: if there is none.
        """
        for document in self._documents:
            return document
        raise NoMoreDocuments

    def _in_drawn_order(self) -> Iterator[Document]:
        source = self.source
        ends = list(accumulate(source.num_rows(file) for file in range(source.num_files())))
        order = shuffled(ends[-1], derive_seed(self.seed, "held-out documents"))
        for begin in range(0, len(order), ROWS_AT_ONCE):
            places, wanted = [], {}
            for number in order[begin : begin + ROWS_AT_ONCE]:
                file = int(np.searchsorted(ends, number, side="right"))
                row = int(number) - (ends[file - 1] if file else 0)
                places.append((file, row))
                wanted.setdefault(file, set()).add(row)
            found = {file: source.rows_again(file, rows) for file, rows in wanted.items()}
            for file, row in places:
                content = found[file][row]
                tokens = self._tokens(content)
                pieces = [] if tokens is None else self._pieces(file, row, tokens)
                if pieces:
                    self.documents_read += 1
                else:
                    self._skip(self._skip_reason(content) if tokens is None else "too short", file, row)
                yield from pieces

    def _skip(self, reason: str, file: int, row: int) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class NoMoreDocuments(Exception):
    """Every document of a source has been read."""


def draw_sequences(stream: DrawnDocuments, count: int, setting: str) -> list[PackedSequence]:
    """Packs `count` sequences of `stream.seq_len` tokens, without padding; a document that does not fit goes on in the next sequence, as
    a document of its own.

    Args:
        setting: what names the source, for error messages.

    Raises:
        UserError: if the source has too few documents.
    """
    packer, sequences = SequencePacker(stream, stream.seq_len), []
    try:
        while len(sequences) < count:
            sequences.append(packer.next_sequence())
    except NoMoreDocuments:
        skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(stream.skipped.items())) or "none"
        raise UserError(
            f"--sequences is {count}, but the documents of {setting} fill only {len(sequences)} sequences of {stream.seq_len} tokens "
            f"(documents used: {stream.documents_read}, at least {stream.min_tokens} tokens each; skipped: {skipped}); lower --sequences, "
            "--length or data.min_document_tokens, or give more documents"
        ) from None
    return sequences
