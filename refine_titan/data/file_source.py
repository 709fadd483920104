"""Documents in files: text files, and tables of several formats."""

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow
import pyarrow.ipc

from refine_titan.data.data_files import (
    BUFFER_BYTES,
    FolderContent,
    compression_of,
    count_lines,
    describe_files,
    format_of,
    line_starts,
    lines_of,
    read_text,
    read_whole,
    reading,
)
from refine_titan.data.fingerprint import sampled_fingerprints
from refine_titan.data.parquet_footer import CheckedParquetFile
from refine_titan.data.parquet_pages import group_batches
from refine_titan.data.rows import DocumentSource, Row, RowReader, between, cell_value, json_object, rows_from, text_row
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_ROW_MIB, read_line

TEXT_FORMAT, TABLE_FORMATS = ".txt", (".jsonl", ".json", ".parquet", ".arrow")
COLUMNAR_FORMATS = (".parquet", ".arrow")
# Rows of a parquet file that are decoded at a time.
PARQUET_ROWS = 128
# Objects of a jsonl or JSON file that are read to find its keys.
CHECKED_OBJECTS = 100


class FileSource(DocumentSource):
    """Documents in files: text files (one document each) and tables (one document per row).

    Tables are jsonl files (an object in each line), JSON files (one array of objects), parquet files, and Arrow files as the library
    `datasets` saves them. Text, jsonl and JSON files may be compressed (`data_files.COMPRESSIONS`).
    """

    def __init__(
        self,
        files: list[Path],
        reader: RowReader,
        root: Path,
        content: FolderContent | None = None,
        setting: str = "data.source",
    ):
        """Checks the columns of parquet and Arrow files, and of JSON if the reader wants that.

        Args:
            files: the files, in the order in which they are read.
            reader: says which columns are read, and makes rows of their values.
            root: the folder that file names are relative to, or the only file.
            content: what the folder holds, for the description; None for a single file.
            setting: the setting that names the files, for error messages.

        Raises:
            UserError: a file cannot be read, or lacks a column.
        """
        self.files = files
        self.reader = reader
        self.root = root
        self.content, self.setting = content or FolderContent(), setting
        self._num_rows: dict[int, int] = {}
        self._array: tuple[Path, list] | None = None
        self._line_starts: dict[Path, array] = {}
        for file, path in enumerate(files):
            if format_of(path) in COLUMNAR_FORMATS:
                schema, self._num_rows[file] = self._schema_and_rows(path)
                reader.check_schema(schema, path)
            elif format_of(path) in TABLE_FORMATS:
                if reader.checks_objects:
                    reader.check_objects(self._first_objects(path), path)
            else:
                self._num_rows[file] = 1

    def num_files(self) -> int:
        return len(self.files)

    def file_name(self, file: int) -> str:
        path = self.files[file]
        return str(path.relative_to(self.root)) if path != self.root else path.name

    def num_rows(self, file: int) -> int:
        path = self.files[file]
        if file not in self._num_rows:
            if format_of(path) == ".json":
                self._num_rows[file] = len(self._objects(path))
            else:
                # A compressed file is slow to read: its lines are counted once, whoever asks.
                with reading(path, self.setting):
                    self._num_rows[file] = count_lines(path)
        return self._num_rows[file]

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        yield from self._wanted_rows(file, rows_from(first_row, stride))

    def why_in_order(self) -> str | None:
        packed = next((path for path in self.files if compression_of(path)), None)
        return None if packed is None else f"holds {packed.name}, which is compressed"

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        path = self.files[file]
        if format_of(path) == ".jsonl" and compression_of(path) is None:
            with reading(path, self.setting):
                return {row: self._jsonl_row(line) for row, line in self._lines_again(path, numbers)}
        found = {}
        for row, content in self._wanted_rows(file, sorted(numbers)):
            found[row] = content
            if len(found) == len(numbers):
                break
        return found

    def identity(self) -> list:
        return [*self._file_identities, *self.reader.identity()]

    @cached_property
    def _file_identities(self) -> list:
        return [[self.file_name(i), *found] for i, found in enumerate(sampled_fingerprints(self.files, self.setting))]

    def description(self) -> list[str]:
        # Lines of jsonl files are not counted: that would read them whole.
        is_known = len(self._num_rows) == len(self.files)
        return describe_files(self.files, self.content, sum(self._num_rows.values()) if is_known else None)

    def _wanted_rows(self, file: int, wanted: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows with the numbers `wanted`, which ascend."""
        path = self.files[file]
        with reading(path, self.setting):
            match format_of(path):
                case ".jsonl":
                    yield from ((i, self._jsonl_row(line)) for i, line in values_at(lines_of(path), wanted))
                case ".json":
                    objects = self._objects(path)
                    yield from ((i, self.reader.object_row(objects[i])) for i in between(wanted, 0, len(objects)))
                case ".parquet":
                    yield from self._parquet_rows(path, wanted)
                case ".arrow":
                    with arrow_batches(path) as batches:
                        yield from batch_rows(batches, self.reader, wanted, path)
                case _:
                    yield from ((i, self._text(path)) for i in between(wanted, 0, 1))

    def _text(self, path: Path) -> Row:
        text = read_text(path)
        return Row(None, "not UTF-8") if text is None else text_row(text)

    def _jsonl_row(self, line: bytes | None) -> Row:
        value = json_object(line)
        return self.reader.skipped(value.skip_reason) if isinstance(value, Row) else self.reader.object_row(value)

    def _lines_again(self, path: Path, numbers: set[int]) -> Iterator[tuple[int, bytes | None]]:
        """Lines of a file that is not compressed, with their numbers, wherever they are; those that it does not have are left out."""
        if path not in self._line_starts:
            self._line_starts[path] = line_starts(path)
        starts = self._line_starts[path]
        with path.open("rb") as file:
            for number in sorted(numbers):
                if number < len(starts):
                    file.seek(starts[number])
                    yield number, read_line(file, MAX_ROW_MIB.nbytes).content

    def _objects(self, path: Path) -> list:
        """The objects of a JSON file; the last file that was read is kept."""
        if self._array is None or self._array[0] != path:
            with reading(path, self.setting):
                self._array = path, json_array(read_whole(path), f"{self.setting}: {path}")
        return self._array[1]

    def _first_objects(self, path: Path) -> list:
        if format_of(path) == ".json":
            return self._objects(path)[:CHECKED_OBJECTS]
        with reading(path, self.setting):
            return [json_object(line) for line in itertools.islice(lines_of(path), CHECKED_OBJECTS)]

    def _parquet_rows(self, path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, Row]]:
        # A buffer and batches of rows, since many files are one row group, which would be read whole before its first row.
        with CheckedParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            columns = self.reader.columns(parquet.schema_arrow.names, path)
            begin = 0
            for number, group in enumerate(parquet.groups):
                if between(wanted, begin, begin + group.num_rows):
                    batches = group_batches(path, parquet, number, columns, PARQUET_ROWS)
                    yield from batch_rows(batches, self.reader, wanted, path, begin)
                begin += group.num_rows

    def _schema_and_rows(self, path: Path) -> tuple[pyarrow.Schema, int]:
        with reading(path, self.setting):
            if format_of(path) == ".parquet":
                with CheckedParquetFile(path) as parquet:
                    metadata = parquet.metadata
                    num_rows, in_groups = metadata.num_rows, sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
                    if in_groups != num_rows:
                        raise UserError(f"{path} is damaged: it says that it has {num_rows} rows, but its row groups have {in_groups}")
                    return parquet.schema_arrow, num_rows
            with arrow_batches(path) as batches:
                return batches.schema, sum(batch.num_rows for batch in batches)


Value = TypeVar("Value")


def values_at(values: Iterable[Value], wanted: Sequence[int]) -> Iterator[tuple[int, Value]]:
    """Yields the values number `wanted`, which ascend, each with its number; those that follow the last one are not read."""
    numbered = enumerate(values)
    for wanted_number in wanted:
        for number, value in numbered:
            if number == wanted_number:
                yield number, value
                break
        else:
            return


def batch_rows(
    batches: Iterable[pyarrow.RecordBatch], reader: RowReader, wanted: Sequence[int], where: Path | str, begin: int = 0
) -> Iterator[tuple[int, Row]]:
    """Yields the rows of batches that have the numbers `wanted`, which ascend; the first row of the first batch has the number `begin`."""
    for batch in batches:
        end = begin + batch.num_rows
        if in_batch := between(wanted, begin, end):
            columns = [batch.column(name) for name in reader.columns(batch.schema.names, where)]
            yield from ((r, reader.row([cell_value(column[r - begin]) for column in columns])) for r in in_batch)
        begin = end


@contextmanager
def arrow_batches(path: Path) -> Iterator[Iterable[pyarrow.RecordBatch]]:
    """Opens an Arrow file in either the stream or the file format; yields its batches, which also have a `schema`."""
    with pyarrow.memory_map(str(path)) as content:
        try:
            reader = pyarrow.ipc.open_stream(content)
        except pyarrow.ArrowInvalid:  # the file format, with a table of contents at its end
            content.seek(0)
            file = pyarrow.ipc.open_file(content)
            reader = pyarrow.RecordBatchReader.from_batches(file.schema, (file.get_batch(i) for i in range(file.num_record_batches)))
        yield reader


def json_array(content: bytes, where: str) -> list:
    """Parses the content of a JSON file, which holds one array; `where` names it in errors.

    Raises:
        UserError: it is not JSON, or holds anything but an array.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise UserError(f"{where} holds {type(value).__name__}; allowed: one array of objects")
    return value
