"""Reads files with one JSON object per line, line by line: a long run's file is never in memory as a whole.

A line that was damaged on its way to the disk or back must not end the run or the report that reads it. It is skipped, and
`DamagedLines` says its number. A last line without a newline is left out: a run was killed while it wrote it.
"""

import json
import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from refine_titan.files.limits import read_lines

logger = logging.getLogger()

# Longest line that is read, in bytes. A step or a rollout takes a few thousand.
LONGEST_LINE = 64 << 20
# Numbers of damaged lines that a message names.
NAMED_LINES = 10

# The number of a step, in a record's fields.
StepNumber = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]

T = TypeVar("T")


class Line(NamedTuple):
    """A complete line: its number from 1, its bytes without the newline, and where it begins and ends in the file.

    `content` is None if the line is longer than LONGEST_LINE.
    """

    number: int
    content: bytes | None
    begin: int
    end: int

    def whole(self) -> bytes:
        """The content; raises ValueError if the line is too long."""
        if self.content is None:
            raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
        return self.content


class DamagedLines:
    """The lines of a file that cannot be read, by number, and the reason of the first."""

    def __init__(self, path: Path):
        self.path = path
        self.numbers: list[int] = []
        self.first_reason = ""

    def add(self, line: Line, reason: object) -> None:
        self.numbers.append(line.number)
        self.first_reason = self.first_reason or str(reason)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __str__(self) -> str:
        """`run/metrics.jsonl: lines 4, 9 are damaged and left out (line 4: JSON is malformed ...)`."""
        named = ", ".join(map(str, self.numbers[:NAMED_LINES]))
        more = f" and {len(self.numbers) - NAMED_LINES:,} more" if len(self.numbers) > NAMED_LINES else ""
        lines = f"line {named} is" if len(self.numbers) == 1 else f"lines {named}{more} are"
        return f"{self.path}: {lines} damaged and left out (line {self.numbers[0]}: {self.first_reason})"

    def warn(self) -> None:
        """Logs a warning if there are any."""
        if self:
            logger.warning(str(self))


class Decoder(Generic[T]):
    """Turns the bytes of a line into a `msgspec.Struct`, whose fields are checked; other fields of the line are not kept."""

    def __init__(self, kind: type[T]):
        self.kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, content: bytes) -> T:
        """Raises ValueError, with the reason, unless `content` is an object with these fields."""
        try:
            return self._decoder.decode(content)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        except (msgspec.DecodeError, RecursionError) as error:
            # A model may sample half of a surrogate pair, which Python writes and reads, and msgspec does not.
            if b"\\ud" not in content.lower():
                raise ValueError(str(error)) from error
        try:
            return msgspec.convert(json.loads(content), self.kind)
        except (ValueError, RecursionError, msgspec.ValidationError) as error:
            raise ValueError(str(error)) from error


def complete_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a file that end with a newline; none if there is no such file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        begin = 0
        for number, (content, nbytes, is_complete) in enumerate(read_lines(file, LONGEST_LINE), start=1):
            if is_complete:
                yield Line(number, content if content is None else content[:-1], begin, begin + nbytes)
            begin += nbytes


def read_records(path: Path, kind: type[T], damaged: DamagedLines) -> Iterator[tuple[Line, T]]:
    """Yields every line of a file with its record, a `msgspec.Struct`; adds those that hold none to `damaged`."""
    decode = Decoder(kind)
    for line in complete_lines(path):
        try:
            record = decode(line.whole())
        except ValueError as error:
            damaged.add(line, error)
        else:
            yield line, record


def read_columns(
    path: Path, names: Sequence[str], damaged: DamagedLines, earlier: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Reads numbers of every record of a file.

    Args:
        names: fields, of which `step` has to be in a line and any other may be absent or null.
        earlier: another key of a field, read where a line lacks the first one. `a.b` is the key `b` of the object `a`.

    Returns:
        For `step` and each name the values `[n]` in float64, NaN where a line has none.
    """
    names, number = [name for name in names if name != "step"], float | None
    fields: list[Any] = [("step", StepNumber)]
    fields += [(f"value{i}", number, msgspec.field(default=None, name=name)) for i, name in enumerate(names)]
    # Struct fields have Python's names; the places of a value in a record are one or two of them.
    inner: dict[str, list[Any]] = {}
    places: list[list[tuple[str, ...]]] = [[(f"value{i}",)] for i in range(len(names))]
    for i, name in enumerate(names):
        key = (earlier or {}).get(name)
        if key is None:
            continue
        outer, _, leaf = key.rpartition(".")
        (inner.setdefault(outer, []) if outer else fields).append((f"earlier{i}", number, msgspec.field(default=None, name=leaf)))
        places[i].append((f"object_{outer}", f"earlier{i}") if outer else (f"earlier{i}",))
    for outer, found in inner.items():
        fields.append((f"object_{outer}", msgspec.defstruct("Object", found) | None, msgspec.field(default=None, name=outer)))
    steps, columns = array("d"), [array("d") for _ in names]
    for _, record in read_records(path, msgspec.defstruct("Numbers", fields), damaged):
        steps.append(record.step)
        for column, found in zip(columns, places):
            column.append(_first_number(record, found))
    return {name: np.frombuffer(values) if values else np.empty(0) for name, values in zip(["step", *names], [steps, *columns])}


def _first_number(record: Any, places: list[tuple[str, ...]]) -> float:
    """The first value that a record has at one of the places; NaN if it has none."""
    for place in places:
        value = record
        for name in place:
            value = None if value is None else getattr(value, name)
        if value is not None:
            return value
    return math.nan
