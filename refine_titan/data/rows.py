"""The interface of a source of documents, and the conversion of one row of a file to text or to a reason to skip it."""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow


class Row(NamedTuple):
    """One row: its text, or its tokens if they are stored, or the reason why it has neither."""

    text: str | None
    skip_reason: str = ""
    tokens: list[int] | None = None


class DocumentSource(ABC):
    """Rows addressed by (file, row), so that a position in the source is two integers."""

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

    @abstractmethod
    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        """Yields rows first_row, first_row + stride, ... of a file, each with its number; the rows between are not parsed."""

    @abstractmethod
    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        """The rows with these numbers, by number, read in one pass over the file."""


def text_row(value: Any) -> Row:
    """Makes a row of a value that should be text."""
    if value is None:
        return Row(None, "null")
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return Row(None, "a list of chat messages, not text")
    if not isinstance(value, str):
        return Row(None, f"not text ({type(value).__name__})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        return Row(None, "not UTF-8")
    return Row(value) if value else Row(None, "empty")


def json_object(line: bytes) -> dict | Row:
    """Parses the object in one line of a jsonl file; returns a row with the reason if there is none."""
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
    try:
        value = cell.as_py()  # only here pyarrow checks that a string column is UTF-8
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
