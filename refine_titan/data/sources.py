"""Sources of documents. A source is a list of files, a file a list of rows, and a row one document or a reason to skip it."""

import io
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from refine_titan.config.sections import Data
from refine_titan.data.data_files import (
    BUFFER_BYTES,
    COMPRESSIONS,
    FolderContent,
    describe_files,
    format_of,
    list_folder,
    open_data,
    reading,
)
from refine_titan.data.fingerprint import sampled_fingerprints
from refine_titan.data.rows import DocumentSource, Row, cell_value, json_object, text_row
from refine_titan.data.shards import MANIFEST, ShardSource, is_prepared
from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.errors import UserError

TEXT_FORMAT, TABLE_FORMATS = ".txt", (".jsonl", ".json", ".parquet", ".arrow")
# Rows of a parquet file that are decoded at a time.
PARQUET_ROWS = 128


class FileSource(DocumentSource):
    """Documents in files: text files (one document each) and tables (one document per row).

    Tables are jsonl files (an object in each line), JSON files (one array of objects), parquet files, and Arrow files as the library
    `datasets` saves them. Text, jsonl and JSON files may be compressed (`data_files.COMPRESSIONS`).
    """

    def __init__(
        self,
        files: list[Path],
        text_column: str,
        root: Path,
        left_out: dict[str, list[str]] | None = None,
        setting: str = "data.source",
    ):
        """Checks the columns of parquet and Arrow files.

        Args:
            files: the files, in the order in which they are read.
            text_column: column or key that holds the text.
            root: the folder that file names are relative to, or the only file.
            left_out: reason -> files of the folder that are not read, for the description.
            setting: the setting that names the files, for error messages.

        Raises:
            UserError: a file cannot be read, or lacks the column.
        """
        self.files = files
        self.text_column = text_column
        self.root = root
        self.left_out, self.setting = left_out or {}, setting
        self._jsonl_lengths: dict[int, int] = {}
        self._array: tuple[Path, list] | None = None
        for path in files:
            if format_of(path) in (".parquet", ".arrow"):
                self._check_columns(path, self._schema_names(path))

    def num_files(self) -> int:
        return len(self.files)

    def file_name(self, file: int) -> str:
        path = self.files[file]
        return str(path.relative_to(self.root)) if path != self.root else path.name

    def num_rows(self, file: int) -> int:
        path = self.files[file]
        match format_of(path):
            case ".jsonl":
                # A compressed file is slow to read: its lines are counted once, whoever asks.
                if file not in self._jsonl_lengths:
                    with reading(path, self.setting), open_data(path) as lines:
                        self._jsonl_lengths[file] = sum(1 for _ in lines)
                return self._jsonl_lengths[file]
            case ".json":
                return len(self._objects(path))
            case ".parquet":
                return pyarrow.parquet.read_metadata(path).num_rows
            case ".arrow":
                with reading(path, self.setting), arrow_batches(path) as batches:
                    return sum(batch.num_rows for batch in batches)
            case _:
                return 1

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        yield from self._wanted_rows(file, lambda row: row >= first_row and (row - first_row) % stride == 0)

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        found = {}
        for row, content in self._wanted_rows(file, numbers.__contains__):
            found[row] = content
            if len(found) == len(numbers):
                break
        return found

    def identity(self) -> list:
        return [*self._file_identities, self.text_column]

    @cached_property
    def _file_identities(self) -> list:
        return [[self.file_name(i), *found] for i, found in enumerate(sampled_fingerprints(self.files))]

    def description(self) -> list[str]:
        return describe_files(self.files, self.left_out)

    def _wanted_rows(self, file: int, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        path = self.files[file]
        with reading(path, self.setting):
            match format_of(path):
                case ".jsonl":
                    yield from self._jsonl_rows(path, is_wanted)
                case ".json":
                    yield from ((i, self._object_row(value)) for i, value in enumerate(self._objects(path)) if is_wanted(i))
                case ".parquet":
                    yield from self._parquet_rows(path, is_wanted)
                case ".arrow":
                    yield from self._arrow_rows(path, is_wanted)
                case _:
                    if is_wanted(0):
                        yield 0, self._text(path)

    def _text(self, path: Path) -> Row:
        try:
            with open_data(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig") as text:
                return text_row(text.read())
        except UnicodeDecodeError:
            return Row(None, "not UTF-8")

    def _jsonl_rows(self, path: Path, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        with open_data(path) as lines:
            for number, line in enumerate(lines):
                if is_wanted(number):
                    value = json_object(line)
                    yield number, self._skipped(value.skip_reason) if isinstance(value, Row) else self._object_row(value)

    def _objects(self, path: Path) -> list:
        """The objects of a JSON file; the last file that was read is kept."""
        if self._array is None or self._array[0] != path:
            with reading(path, self.setting), open_data(path) as content:
                self._array = path, json_array(content.read(), f"{self.setting}: {path}")
        return self._array[1]

    def _object_row(self, value: Any) -> Row:
        """Makes a row from an object of a jsonl or JSON file."""
        if not isinstance(value, dict) or self.text_column not in value:
            return Row(None, f"no key {self.text_column!r}")
        return text_row(value[self.text_column])

    def _skipped(self, reason: str) -> Row:
        """Makes a row that is skipped for a reason."""
        return Row(None, reason)

    def _parquet_rows(self, path: Path, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        # A buffer and batches of rows, since many files are one row group, which would be read whole before its first row.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            columns = self._columns(parquet.schema_arrow.names)
            begin = 0
            for group in range(parquet.num_row_groups):
                end = begin + parquet.metadata.row_group(group).num_rows
                if any(map(is_wanted, range(begin, end))):
                    first = begin
                    for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                        cells = [batch.column(name) for name in columns]
                        for r in range(batch.num_rows):
                            if is_wanted(first + r):
                                yield first + r, self._row_of([cell_value(column[r]) for column in cells])
                        first += batch.num_rows
                begin = end

    def _arrow_rows(self, path: Path, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        begin = 0
        with arrow_batches(path) as batches:
            for batch in batches:
                columns = [batch.column(name) for name in self._columns(batch.schema.names)]
                for r in range(batch.num_rows):
                    if is_wanted(begin + r):
                        yield begin + r, self._row_of([cell_value(column[r]) for column in columns])
                begin += batch.num_rows

    def _columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a table from which `_row_of` makes a row."""
        return [self.text_column]

    def _row_of(self, values: list[Any]) -> Row:
        """Makes a row from the values of `_columns`."""
        return values[0] if isinstance(values[0], Row) else text_row(values[0])

    def _schema_names(self, path: Path) -> list[str]:
        with reading(path, self.setting):
            if format_of(path) == ".parquet":
                return pyarrow.parquet.read_schema(path).names
            with arrow_batches(path) as batches:
                return batches.schema.names

    def _check_columns(self, path: Path, names: Sequence[str]) -> None:
        if self.text_column not in names:
            raise UserError(f"data.text_column is {self.text_column!r}; {path} has the columns: {', '.join(names)}")


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


class SyntheticSource(DocumentSource):
    """Endless generated documents; row i is a function of (seed, i)."""

    def __init__(self, corpus: RetrievalCorpus):
        self.corpus = corpus

    def num_files(self) -> int:
        return 1

    def file_name(self, file: int) -> str:
        return "synthetic"

    def num_rows(self, file: int) -> int:
        raise AssertionError("a synthetic corpus has no end")

    def description(self) -> list[str]:
        return [f"generated documents of {self.corpus.num_tokens:,} tokens with {self.corpus.num_needles} needles"]

    def identity(self) -> list:
        return ["synthetic", self.corpus.num_tokens, self.corpus.num_needles]

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        return {row: Row(self.corpus.document(row)) for row in numbers}

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        row = first_row
        while True:
            yield row, Row(self.corpus.document(row))
            row += stride


def build_source(data: Data, tokenizer, seq_len: int, seed: int, setting: str = "data.source") -> DocumentSource:
    """Builds the source that `data.source` names.

    Args:
        setting: the setting that gave `data.source` its value, for error messages.

    Raises:
        UserError: the path does not exist or holds no readable file, or a table lacks the column.
    """
    if data.source == "synthetic":
        if data.min_document_tokens > seq_len:
            raise UserError(
                f"data.min_document_tokens is {data.min_document_tokens}; synthetic documents have training.seq_len = "
                f"{seq_len} tokens, allowed: at most that"
            )
        return SyntheticSource(RetrievalCorpus(tokenizer, num_tokens=seq_len, num_needles=data.synthetic_needles, seed=seed))
    if data.source == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return FileSource(_python_sources(root), data.text_column, root)
    path = Path(data.source)
    if is_prepared(path):
        return _prepared_source(path, data, tokenizer, seq_len)
    if path.is_file():
        if format_of(path) == ".parquet" and is_prepared(path.parent):
            raise UserError(f"{setting} is {data.source!r}, a part of prepared data; name the folder that holds {MANIFEST}")
        check_format(path, (TEXT_FORMAT, *TABLE_FORMATS, *data.folder_suffixes), f"{setting} is {data.source!r}")
        return FileSource([path], data.text_column, path, setting=setting)
    if path.is_dir():
        content = list_files(path, data.folder_suffixes, setting)
        return FileSource(content.files, data.text_column, path, content.left_out, setting)
    raise UserError(f"{setting} is {data.source!r}: no such file or folder; or use 'python-stdlib' or 'synthetic'")


def check_format(path: Path, formats: Sequence[str], found: str) -> None:
    """Raises UserError, whose message begins with `found`, unless a file has one of the formats."""
    if format_of(path) not in formats:
        allowed = ", ".join(dict.fromkeys(formats))
        raise UserError(f"{found}; allowed files end in {allowed}, or in one of them and {' or '.join(COMPRESSIONS)}")


def list_files(folder: Path, formats: Sequence[str], setting: str = "data.source") -> FolderContent:
    """Lists the files of a folder that are of one of the formats.

    Raises:
        UserError: there is none.
    """
    content = list_folder(folder, formats)
    if not content.files:
        raise UserError(f"{setting}: the folder {folder} holds no file ending in {', '.join(formats)}")
    return content


def _prepared_source(path: Path, data: Data, tokenizer, seq_len: int) -> ShardSource:
    source = ShardSource(path, tokenizer)
    min_tokens = data.min_document_tokens or seq_len
    if source.longest_document < min_tokens:
        raise UserError(
            f"data.source: the documents of {path} have at most {source.longest_document} tokens; data.min_document_tokens "
            f"({min_tokens}, by default training.seq_len) may be at most that, or prepare the data with a larger --max-tokens"
        )
    return source


def _python_sources(root: Path) -> list[Path]:
    """The modules of Python's standard library, without installed packages and without its tests, which some distributions lack."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts[:-1]))
