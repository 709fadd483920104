"""The interface of a source of documents, and the conversion of one row of a file to text or to a reason to skip it."""

import codecs
import json
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from refine_titan.data.chat import is_chat
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_ROW_MIB


class Row(NamedTuple):
    """One row: its text, or its tokens if they are stored, or the reason why it has neither; with stored tokens, the file and row from
    which they were made."""

    text: str | None
    skip_reason: str = ""
    tokens: list[int] | None = None
    origin: str = ""


class DocumentSource(ABC):
    """Rows addressed by (file, row), so that a position in the source is two integers.

    Attributes:
        holdout_percent: the share of its documents that belongs to another part (`holdout.py`).
    """

    holdout_percent = 0.0

    @abstractmethod
    def num_files(self) -> int: ...

    @abstractmethod
    def file_name(self, file: int) -> str: ...

    @abstractmethod
    def num_rows(self, file: int) -> int: ...

    @abstractmethod
    def identity(self) -> list:
        """A JSON-serialisable value that is equal for two sources with the same rows."""

    @abstractmethod
    def description(self) -> list[str]:
        """Lines that say what is read, and what is left out and why."""

    def why_in_order(self) -> str | None:
        """Why its rows can only be read in their order, to end a sentence; None if any row is found at once."""
        return None

    @abstractmethod
    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        """Yields rows first_row, first_row + stride, ... of a file, each with its number; the rows between are not parsed."""

    @abstractmethod
    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        """The rows with these numbers, by number, read in one pass over the file."""


def rows_from(first_row: int, stride: int) -> range:
    """The numbers first_row, first_row + stride, ... without end."""
    return range(first_row, sys.maxsize, stride)


def between(wanted: Sequence[int], begin: int, end: int) -> Sequence[int]:
    """Those of ascending numbers that are at least `begin` and below `end`; the others are not looked at one by one."""
    return wanted[bisect_left(wanted, begin) : bisect_left(wanted, end)]


class RowReader(ABC):
    """Which columns of a table are read, and what becomes of their values.

    Attributes:
        checks_objects: whether the keys of JSON objects are checked before they are read.
    """

    checks_objects = False

    @abstractmethod
    def identity(self) -> list:
        """A JSON-serialisable value that is equal for two readers that make the same rows."""

    @abstractmethod
    def columns(self, names: Sequence[str], where: Path | str) -> list[str]:
        """The columns that are read of a table with these ones.

        Raises:
            UserError: the table `where` lacks one.
        """

    def check_schema(self, schema: pyarrow.Schema, where: Path | str) -> None:
        """Raises UserError if the table `where` cannot be read."""
        self.columns(schema.names, where)

    @abstractmethod
    def check_objects(self, objects: Sequence[Any], where: Path | str) -> None:
        """Raises UserError if the file `where`, which begins with these JSON values, cannot be read."""

    @abstractmethod
    def row(self, values: list[Any]) -> Row:
        """Makes a row of the values of `columns`, some of which may be a `Row` that says why there is no value."""

    @abstractmethod
    def object_row(self, value: Any) -> Row:
        """Makes a row of a JSON value."""

    def skipped(self, reason: str) -> Row:
        """Makes a row that is skipped for a reason."""
        return Row(None, reason)


class TextReader(RowReader):
    """Makes documents of rows: the text in one column."""

    def __init__(self, text_column: str):
        self.text_column = text_column

    def identity(self) -> list:
        return [self.text_column]

    def columns(self, names: Sequence[str], where: Path | str) -> list[str]:
        if self.text_column not in names:
            raise UserError(f"data.text_column is {self.text_column!r}; {where} has the columns: {', '.join(names)}")
        return [self.text_column]

    def check_objects(self, objects: Sequence[Any], where: Path | str) -> None:
        """Accepts all: objects without the text are skipped while they are read."""

    def row(self, values: list[Any]) -> Row:
        return values[0] if isinstance(values[0], Row) else text_row(values[0])

    def object_row(self, value: Any) -> Row:
        if isinstance(value, dict) and self.text_column in value:
            return text_row(value[self.text_column])
        chats = [name for name, found in value.items() if is_chat(found)] if isinstance(value, dict) else []
        hint = f", and {chats[0]!r} is a list of chat messages, which post-training and evaluations read" if chats else ""
        return Row(None, f"no key {self.text_column!r}{hint}")


def text_row(value: Any) -> Row:
    """Makes a row of a value that should be text."""
    if value is None:
        return Row(None, "null")
    if is_chat(value):
        return Row(None, "a list of chat messages, not text")
    if not isinstance(value, str):
        return Row(None, f"not text ({type(value).__name__})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        return Row(None, "not UTF-8")
    return Row(value) if value else Row(None, "empty")


def too_long() -> Row:
    """The row in place of one that is larger than MAX_ROW_MIB."""
    return Row(None, f"more than {MAX_ROW_MIB.value:,} MiB ({MAX_ROW_MIB.variable})")


def json_object(line: bytes | None) -> dict | Row:
    """Parses the object in one line of a jsonl file, None for one that is too long; returns a row with the reason if there is none."""
    if line is None:
        return too_long()
    if not line.strip():
        return Row(None, "empty")
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
    except (ValueError, RecursionError):  # malformed, a number of thousands of digits, or nested too deeply
        return Row(None, "not JSON")
    return value if isinstance(value, dict) else {}


def cell_value(cell: pyarrow.Scalar) -> Any:
    """The Python value of a parquet cell, or a row with the reason why there is none."""
    if isinstance(cell, pyarrow.DictionaryScalar):
        cell = cell.value
    if _nbytes(cell) > MAX_ROW_MIB.nbytes:
        return too_long()
    try:
        value = cell.as_py()  # only here pyarrow checks that a string column is UTF-8
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")


def _nbytes(cell: pyarrow.Scalar) -> int:
    """Bytes of a text, or of a list; 0 for anything else, which is no row's text."""
    if not cell.is_valid:
        return 0
    if isinstance(cell, (pyarrow.ListScalar, pyarrow.LargeListScalar)):
        return cell.values.nbytes
    return cell.as_buffer().size if isinstance(cell, (pyarrow.BinaryScalar, pyarrow.LargeBinaryScalar)) else 0
