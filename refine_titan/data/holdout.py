"""Splits the documents of a source into those that a run trains on and those that it never sees (`data.holdout_percent`)."""

import hashlib
from collections.abc import Iterator

from refine_titan.config.sections import Data
from refine_titan.data.rows import DocumentSource, Row
from refine_titan.errors import UserError

# Why a row is skipped by whoever reads the other part.
HELD_OUT, FOR_TRAINING = "held out", "for training"


def training_part(source: DocumentSource, data: Data) -> DocumentSource:
    """The documents of a source that are trained on: all of them if none are held out."""
    return Part(source, data.holdout_percent, held_out=False) if data.holdout_percent else source


def held_out_part(source: DocumentSource, data: Data) -> DocumentSource:
    """The documents of a source that are never trained on.

    Raises:
        UserError: if none are held out.
    """
    if not data.holdout_percent:
        raise UserError("data.holdout_percent is 0, which holds no document out; allowed for documents held out: above 0, below 100")
    return Part(source, data.holdout_percent, held_out=True)


def is_held_out(content: Row, percent: float) -> bool:
    """Whether the hash of a document is among the last `percent` percent. It is that of the text, so that the same text is on the same side
    wherever it lies and whatever else there is; of stored tokens that of the file and row from which they come, which pieces share."""
    identity = content.text if content.text is not None else content.origin
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >= (1 - percent / 100) * 2**64


class Part(DocumentSource):
    """One of the two parts of a source: the rows of the other part have a reason to be skipped in place of their content."""

    def __init__(self, source: DocumentSource, percent: float, *, held_out: bool):
        self.source, self.holdout_percent, self.held_out = source, percent, held_out

    def num_files(self) -> int:
        return self.source.num_files()

    def file_name(self, file: int) -> str:
        return self.source.file_name(file)

    def num_rows(self, file: int) -> int:
        return self.source.num_rows(file)

    def identity(self) -> list:
        return self.source.identity()

    def description(self) -> list[str]:
        which = f"the {self.holdout_percent:g} %" if self.held_out else f"all but the {self.holdout_percent:g} %"
        return [*self.source.description(), f"{which} of its documents that are held out (data.holdout_percent)"]

    def why_in_order(self) -> str | None:
        return self.source.why_in_order()

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        return ((number, self._own(content)) for number, content in self.source.rows(file, first_row, stride))

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        return {number: self._own(content) for number, content in self.source.rows_again(file, numbers).items()}

    def _own(self, content: Row) -> Row:
        if content.text is None and content.tokens is None:
            return content
        held_out = is_held_out(content, self.holdout_percent)
        return content if held_out == self.held_out else Row(None, HELD_OUT if held_out else FOR_TRAINING)
