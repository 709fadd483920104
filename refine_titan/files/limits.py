"""Limits of what a file from elsewhere may cost: a small file can ask for any amount of memory and time.

Each limit has a default far above what published models and data need, and an environment variable that sets another value for every
command. Errors name the file, what was found and the variable.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from refine_titan.errors import UserError

MIB = 1 << 20
# Bytes that are read at once of what is not kept.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Limit:
    """A limit.

    Attributes:
        variable: the environment variable that sets it.
        default: its value where the variable is not set.
    """

    variable: str
    default: int

    @property
    def value(self) -> int:
        """Raises UserError if the variable holds anything but a whole number above 0."""
        text = os.environ.get(self.variable, str(self.default))
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
            raise UserError(f"the environment variable {self.variable} is {text!r:.80}; allowed: whole numbers above 0, below 10^9")
        return int(text)

    @property
    def nbytes(self) -> int:
        """A limit in MiB in bytes."""
        return self.value * MIB

    def words(self, unit: str = "") -> str:
        """`at most 64 MiB, or what the environment variable REFINE_TITAN_MAX_ROW_MIB says`."""
        return f"at most {self.value:,}{unit}, or what the environment variable {self.variable} says"


# Layers of a model: each costs a millisecond and more before a weight is read. The deepest published models have about 130.
MAX_LAYERS = Limit("REFINE_TITAN_MAX_LAYERS", 512)
# JSON files that are read whole, among them tokenizers: the largest published ones have about 35 MiB.
MAX_JSON_MIB = Limit("REFINE_TITAN_MAX_JSON_MIB", 128)
# A row of a table: a line of jsonl, a cell of parquet or Arrow.
MAX_ROW_MIB = Limit("REFINE_TITAN_MAX_ROW_MIB", 64)
# A page of a parquet file, which is decompressed as a whole. Some writers make pages of 100 MB.
MAX_PAGE_MIB = Limit("REFINE_TITAN_MAX_PAGE_MIB", 256)
# A file of data that is read whole: a text file is one document, a JSON file one array.
MAX_FILE_MIB = Limit("REFINE_TITAN_MAX_FILE_MIB", 1024)
# How often a compressed file may hold its own size. Text is compressed to a third or a tenth.
MAX_EXPANSION = Limit("REFINE_TITAN_MAX_EXPANSION", 1000)


def read_small_file(path: Path) -> bytes:
    """Reads a file of at most MAX_JSON_MIB.

    Raises:
        UserError: it is larger, or no regular file (a device or a pipe may give bytes without end, or none).
        OSError: it cannot be read.
    """
    check_small_file(path)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_MIB.nbytes + 1)
    if len(content) > MAX_JSON_MIB.nbytes:
        raise UserError(f"{path} grows while it is read")
    return content


def check_small_file(path: Path) -> None:
    """Raises UserError unless a file is a regular one of at most MAX_JSON_MIB; OSError if there is none."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is {kind_of(found.st_mode)}, not a regular file")
    if found.st_size > MAX_JSON_MIB.nbytes:
        raise UserError(f"{path} has {found.st_size:,} bytes; allowed: {MAX_JSON_MIB.words(' MiB')}")


def kind_of(mode: int) -> str:
    """What a path is that is not a regular file, from its `st_mode`."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((words for test, words in kinds if test(mode)), "a device")


class ReadLine(NamedTuple):
    """A line with its newline, None if it is too long to be kept; its number of bytes; and whether it ends with a newline."""

    content: bytes | None
    nbytes: int
    is_complete: bool


def read_line(file: BinaryIO, longest: int) -> ReadLine:
    """Reads a line without keeping more than `longest` bytes of it; one of 0 bytes at the end of the file."""
    content = file.readline(longest + 1)
    if len(content) <= longest:
        return ReadLine(content, len(content), content.endswith(b"\n"))
    nbytes, is_complete = len(content), content.endswith(b"\n")
    while content and not is_complete:
        content = file.readline(BLOCK_BYTES)
        nbytes, is_complete = nbytes + len(content), content.endswith(b"\n")
    return ReadLine(None, nbytes, is_complete)


def read_lines(file: BinaryIO, longest: int) -> Iterator[ReadLine]:
    """Yields `read_line` until the end of the file."""
    while (found := read_line(file, longest)).nbytes:
        yield found
