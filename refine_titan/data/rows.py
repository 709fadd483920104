"""What a source of documents is, and how one row of a file becomes text or a reason to skip it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow


class Row(NamedTuple):
    """One row: its text, or its tokens where they are stored, or neither with the reason why it has none."""

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
        """What two sources with the same rows have in common, JSON-serialisable."""

    @abstractmethod
    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        """Rows first_row, first_row + stride, ... of a file, with their numbers; rows between are not parsed."""

    @abstractmethod
    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        """The rows of these numbers, in one pass over the file."""


def text_row(value: Any) -> Row:
    """The row of a value that should be text."""
    if value is None:
        return Row(None, "null")
    if not isinstance(value, str):
        return Row(None, f"not text ({type(value).__name__})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Row(None, "not UTF-8")
    return Row(value) if value else Row(None, "empty")


def json_object(line: bytes) -> dict | Row:
    """The object in one line of a jsonl file, or the row that says why there is none."""
    if not line.strip():
        return Row(None, "empty")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
    except (ValueError, RecursionError):  # malformed, a number of thousands of digits, or nested too deeply
        return Row(None, "not JSON")
    return value if isinstance(value, dict) else {}


def cell_value(cell: pyarrow.Scalar) -> Any:
    """The Python value of a parquet cell, or the row that says why there is none."""
    try:
        value = cell.as_py()  # pyarrow does not check that a string column is UTF-8 before this
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
