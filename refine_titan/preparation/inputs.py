"""The input files: finds them, takes an inventory of each, and reads their segments, which are independent of each other."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torchtitan.tools.logging import logger

from refine_titan.data.data_files import (
    COMPRESSIONS,
    compression_of,
    format_of,
    lines_of,
    list_folder,
    open_data,
    read_text,
    reading,
    some,
    warn_of_long_line,
)
from refine_titan.data.parquet_footer import CheckedParquetFile
from refine_titan.data.parquet_pages import group_batches
from refine_titan.data.question_rows import ANSWER_COLUMNS
from refine_titan.data.rows import Row, cell_value, json_object
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_ROW_MIB, read_line
from refine_titan.preparation.files import file_sha256
from refine_titan.preparation.settings import TABLE_SUFFIXES, Settings

BLOCK_BYTES = 1 << 22
ROWS_TO_TRY = 20
READ_ROWS = 32  # rows of a parquet file that are read at a time: a row may be a whole book


@dataclass(frozen=True)
class InputFile:
    """A file and its name, which does not depend on where the input lies: the path relative to the given folder."""

    name: str
    path: Path

    @property
    def compression(self) -> str | None:
        return compression_of(self.path)

    @property
    def format(self) -> str:
        """`.jsonl`, `.parquet` or the suffix of a text file. The whole content of a text file is one row."""
        return format_of(self.path)


class Segment(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        start, stop: byte offsets (uncompressed) of a jsonl file, row groups of a parquet file, 0 and 1 of a text file.
        first_row: number of the segment's first row in the file.
        nbytes: uncompressed size of the segment.
    """

    start: int
    stop: int
    first_row: int
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """The content of a file, found by reading it once; `nbytes` and `modified_ns` are its size and time of change on disk."""

    name: str
    nbytes: int
    modified_ns: int
    sha256: str
    rows: int
    segments: tuple[Segment, ...]


def find_inputs(paths: list[Path], settings: Settings) -> list[InputFile]:
    """Finds the files that the paths name, in the order of the paths; the files of a folder are sorted.

    Raises:
        UserError: a path does not exist or cannot be used, or a folder holds no usable file.
    """
    found = []
    for number, path in enumerate(paths, start=1):
        if path.is_file():
            files = [InputFile(path.name, path)]
            if files[0].format not in settings.suffixes:
                raise UserError(f"--input {path} ends in {files[0].format!r}; allowed: {_endings(settings)}")
        elif path.is_dir():
            files = _files_in(path, settings)
        else:
            raise UserError(f"--input {path}: no such file or folder")
        taken = {file.name for file in found}
        clash = any(file.name in taken for file in files)
        found += [InputFile(f"{number}:{file.name}", file.path) for file in files] if clash else files
    if settings.kind == "questions":
        for file in found:
            if file.format not in TABLE_SUFFIXES:
                raise UserError(f"{file.path} is not a table; questions are read from {', '.join(TABLE_SUFFIXES)} files")
    return found


def _files_in(folder: Path, settings: Settings) -> list[InputFile]:
    content = list_folder(folder, settings.suffixes)
    if content.outside:
        logger.warning(f"--input {folder}: {len(content.outside)} file(s) are read through links out of it: {some(content.outside)}")
    usable = [InputFile(str(path.relative_to(folder)), path) for path in content.files]
    matching = [file for file in usable if fnmatch(file.name, settings.files)]
    if not usable:
        raise UserError(f"--input {folder} holds no file ending in {_endings(settings)}")
    if not matching:
        raise UserError(
            f"--input {folder}: no path matches --files {settings.files!r}; there are {len(usable)} files, such as {usable[0].name}"
        )
    return matching


def _endings(settings: Settings) -> str:
    return f"{', '.join(settings.suffixes)}, or one of them and {' or '.join(COMPRESSIONS)}"


def column_names(settings: Settings) -> list[tuple[str, ...]]:
    """The columns that are read of a row, each with the names that it may have."""
    if settings.kind == "documents":
        return [(settings.text_column,)]
    return [(settings.prompt_column,), (settings.answers_column,) if settings.answers_column else ANSWER_COLUMNS]


def take_inventory(file: InputFile, settings: Settings, unit_bytes: int) -> Inventory:
    """Reads a whole file and returns its hash, its number of rows, and segments of about `unit_bytes`.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    with reading(file.path):
        stat = file.path.stat()
        sha256 = file_sha256(file.path)
    if file.format == ".parquet":
        rows, segments = _parquet_segments(file, settings, unit_bytes)
    elif file.format == ".jsonl":
        rows, segments = _jsonl_segments(file, unit_bytes)
        _check_keys(file, settings)
    else:
        rows, segments = 1, [Segment(0, 1, 0, stat.st_size)]
    return Inventory(file.name, stat.st_size, stat.st_mtime_ns, sha256, rows, tuple(segments))


def is_unchanged(file: InputFile, inventory: Inventory) -> bool:
    """Whether a file still has the size and the time of change that it had when it was read."""
    try:
        stat = file.path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (inventory.nbytes, inventory.modified_ns)


def _parquet_segments(file: InputFile, settings: Settings, unit_bytes: int) -> tuple[int, list[Segment]]:
    with reading(file.path), CheckedParquetFile(file.path) as parquet:
        present = parquet.schema_arrow.names
        wanted = [_choose(names, present, file) for names in column_names(settings)]
        segments, start, first_row, rows, nbytes = [], 0, 0, 0, 0
        for number, group in enumerate(parquet.groups):
            nbytes += sum(chunk.uncompressed for column in wanted for chunk in parquet.column_chunks(number, column))
            rows += group.num_rows
            if nbytes >= unit_bytes or number == len(parquet.groups) - 1:
                segments.append(Segment(start, number + 1, first_row, nbytes))
                start, first_row, nbytes = number + 1, rows, 0
    return rows, segments


def _choose(names: tuple[str, ...], present: list[str], file: InputFile) -> str:
    for name in names:
        if name in present:
            return name
    wanted = " or ".join(repr(name) for name in names)
    raise UserError(f"{file.path} has no column {wanted}; it has the columns: {', '.join(present)}")


def _jsonl_segments(file: InputFile, unit_bytes: int) -> tuple[int, list[Segment]]:
    """Cuts the file at the first end of a line after every `unit_bytes`; returns the number of rows and the segments."""
    segments, start, first_row, rows, position, last = [], 0, 0, 0, 0, b"\n"
    with reading(file.path), open_data(file.path) as lines:
        while block := lines.read(BLOCK_BYTES):
            at = 0
            while (newline := block.find(b"\n", max(at, start + unit_bytes - 1 - position))) >= 0:
                rows += block.count(b"\n", at, newline + 1)
                at = newline + 1
                segments.append(Segment(start, position + at, first_row, position + at - start))
                start, first_row = position + at, rows
            rows += block.count(b"\n", at)
            position += len(block)
            last = block[-1:]
    if position > start:
        rows += last != b"\n"
        segments.append(Segment(start, position, first_row, position - start))
    return rows, segments


def _check_keys(file: InputFile, settings: Settings) -> None:
    """Raises UserError if the first rows are objects, and none of them has a key that is needed."""
    with reading(file.path):
        lines = itertools.islice(lines_of(file.path), ROWS_TO_TRY)
        objects = [value for line in lines if isinstance(value := json_object(line), dict)]
    found = list(dict.fromkeys(name for value in objects for name in value))
    for names in column_names(settings):
        if found and not any(name in found for name in names):
            _choose(names, found, file)


def read_segment(file: InputFile, segment: Segment, settings: Settings) -> Iterator[tuple[int, list[Any] | Row]]:
    """Yields for each row of a segment its number, and the values of `column_names` or a `Row` that says why there are none.

    Raises:
        UserError: the file cannot be read.
    """
    with reading(file.path):
        if file.format == ".parquet":
            yield from _parquet_rows(file, segment, settings)
        elif file.format == ".jsonl":
            yield from _jsonl_rows(file, segment, settings)
        else:
            yield 0, _text(file)


def _text(file: InputFile) -> list[Any] | Row:
    text = read_text(file.path)
    return Row(None, "not UTF-8") if text is None else [text]


def _parquet_rows(file: InputFile, segment: Segment, settings: Settings) -> Iterator[tuple[int, list[Any] | Row]]:
    row = segment.first_row
    with CheckedParquetFile(file.path) as parquet:
        columns = [_choose(names, parquet.schema_arrow.names, file) for names in column_names(settings)]
        for group in range(segment.start, segment.stop):
            for batch in group_batches(file.path, parquet, group, columns, READ_ROWS, use_threads=False):
                cells = [batch.column(name) for name in columns]
                for i in range(batch.num_rows):
                    values = [cell_value(column[i]) for column in cells]
                    yield row, next((value for value in values if isinstance(value, Row)), values)
                    row += 1


def _jsonl_rows(file: InputFile, segment: Segment, settings: Settings) -> Iterator[tuple[int, list[Any] | Row]]:
    keys = column_names(settings)
    lines = _positioned(file, segment.start)
    position, row = segment.start, segment.first_row
    while position < segment.stop:
        line = read_line(lines, MAX_ROW_MIB.nbytes)
        if not line.nbytes:
            raise UserError(f"{file.path} has become shorter while it was read")
        position += line.nbytes
        _streams[file.path] = (position, lines)
        if line.content is None:
            warn_of_long_line(file.path, row + 1, line.nbytes)
        value = json_object(line.content)
        if isinstance(value, dict):
            chosen = [next((name for name in names if name in value), None) for names in keys]
            missing = [names for names, name in zip(keys, chosen) if name is None]
            value = Row(None, f"no key {' or '.join(map(repr, missing[0]))}") if missing else [value[name] for name in chosen]
        yield row, value
        row += 1


# Reading a compressed file cannot start in the middle. A process gets the segments of a file in rising order and keeps the file
# open, so that it decompresses the file once, however many segments there are.
_streams: dict[Path, tuple[int, BinaryIO]] = {}


def _positioned(file: InputFile, start: int) -> BinaryIO:
    position, lines = _streams.pop(file.path, (0, None))
    for _, other in _streams.values():
        other.close()
    _streams.clear()
    if lines is None or position > start:
        position, lines = 0, open_data(file.path)
    if file.compression is None:
        lines.seek(start)
        return lines
    while position < start:
        skipped = lines.read(min(BLOCK_BYTES, start - position))
        if not skipped:
            raise UserError(f"{file.path} has become shorter while it was read")
        position += len(skipped)
    return lines
