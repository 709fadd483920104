"""Reads files with one JSON object per line, line by line: a long run's file is never in memory as a whole.

A line that was damaged on its way to the disk or back must not end the run or the report that reads it. It is skipped, and
`DamagedLines` says its number. A last line without a newline is left out: a run was killed while it wrote it.
"""

import itertools
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
from refine_titan.files.reasons import naming

logger = logging.getLogger()

# Longest line that is read, in bytes. A step or a rollout takes a few thousand.
LONGEST_LINE = 64 << 20
# Numbers of damaged lines that a message names.
NAMED_LINES = 10

# Numbers of records that are turned into columns at once.
BLOCK_NUMBERS = 1 << 16

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
    """Yields the lines of a file that end with a newline; none if there is no such file.

    Raises:
        OSError: it cannot be read; the error carries the path.
    """
    if not path.exists():
        return
    with naming(path), path.open("rb") as file:
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
    names, number = ["step", *(name for name in names if name != "step")], float | None
    fields: list[Any] = [("step", StepNumber)]
    fields += [(f"value{i}", number, msgspec.field(default=None, name=name)) for i, name in enumerate(names) if i]
    # The earlier keys follow the others, in the order of `others`; those within objects come last.
    inner: dict[str, list[str]] = {}
    others: list[str] = []
    for name in names:
        outer, _, leaf = (earlier or {}).get(name, "").rpartition(".")
        if outer:
            inner.setdefault(outer, []).append(name)
        elif leaf:
            fields.append((f"earlier{len(others)}", number, msgspec.field(default=None, name=leaf)))
            others.append(name)
    num_numbers, sizes = len(fields), []
    for outer, own in inner.items():
        leaves = [(f"leaf{i}", number, msgspec.field(default=None, name=earlier[name].rpartition(".")[2])) for i, name in enumerate(own)]
        fields.append((f"object{len(sizes)}", msgspec.defstruct("Object", leaves) | None, msgspec.field(default=None, name=outer)))
        others += own
        sizes.append(len(own))
    columns, block = [array("d") for _ in names], array("d")
    for _, record in read_records(path, msgspec.defstruct("Numbers", fields), damaged):
        values = msgspec.structs.astuple(record)
        if sizes:
            found = [(None,) * size if part is None else msgspec.structs.astuple(part) for part, size in zip(values[num_numbers:], sizes)]
            values = [*values[:num_numbers], *itertools.chain.from_iterable(found)]
        block.extend([math.nan if value is None else value for value in values])
        if len(block) >= BLOCK_NUMBERS:
            _add_block(columns, block, names, others)
            block = array("d")
    _add_block(columns, block, names, others)
    return {name: np.frombuffer(column) if column else np.empty(0) for name, column in zip(names, columns)}


def _add_block(columns: Sequence[array], block: array, names: Sequence[str], others: Sequence[str]) -> None:
    """Adds records to columns. A record in `block` has a number for each of `names`, then one under the earlier key of each of `others`."""
    found_nv = np.frombuffer(block).reshape(-1, len(names) + len(others)) if block else np.empty((0, len(names) + len(others)))
    for i, (name, column) in enumerate(zip(names, columns)):
        values_n = found_nv[:, i]
        if name in others:
            values_n = np.where(np.isnan(values_n), found_nv[:, len(names) + others.index(name)], values_n)
        column.frombytes(values_n.tobytes())
