"""Sources of documents. A source is a list of files, a file a list of rows, and a row one document or a reason to skip it."""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from refine_titan.config.sections import Data
from refine_titan.data.rows import DocumentSource, Row, cell_value, json_object, text_row
from refine_titan.data.shards import MANIFEST, ShardSource, is_prepared
from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.errors import UserError

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")


class FileSource(DocumentSource):
    """Text files (one document each), jsonl files (one per line) and parquet files (one per row)."""

    def __init__(self, files: list[Path], text_column: str, root: Path):
        self.files = files
        self.text_column = text_column
        self.root = root
        for path in files:
            if path.suffix == ".parquet":
                self._check_parquet(path)

    def num_files(self) -> int:
        return len(self.files)

    def file_name(self, file: int) -> str:
        path = self.files[file]
        return str(path.relative_to(self.root)) if path != self.root else path.name

    def num_rows(self, file: int) -> int:
        path = self.files[file]
        if path.suffix == ".jsonl":
            with _open(path) as lines:
                return sum(1 for _ in lines)
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_metadata(path).num_rows
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
        return [[self.file_name(i), path.stat().st_size] for i, path in enumerate(self.files)] + [self.text_column]

    def _wanted_rows(self, file: int, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        path = self.files[file]
        if path.suffix == ".jsonl":
            yield from self._jsonl_rows(path, is_wanted)
        elif path.suffix == ".parquet":
            yield from self._parquet_rows(path, is_wanted)
        elif is_wanted(0):
            yield 0, self._text(path)

    def _text(self, path: Path) -> Row:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return Row(None, "not UTF-8")
        except OSError as error:
            return Row(None, f"unreadable ({error.strerror})")
        return text_row(text)

    def _jsonl_rows(self, path: Path, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        with _open(path) as lines:
            for number, line in enumerate(lines):
                if is_wanted(number):
                    yield number, self._jsonl_row(line)

    def _jsonl_row(self, line: bytes) -> Row:
        value = json_object(line)
        if isinstance(value, Row):
            return value
        if self.text_column not in value:
            return Row(None, f"no key {self.text_column!r}")
        return text_row(value[self.text_column])

    def _parquet_rows(self, path: Path, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, Row]]:
        try:
            with pyarrow.parquet.ParquetFile(path) as parquet:
                columns = self._columns(parquet.schema_arrow.names)
                begin = 0
                for group in range(parquet.num_row_groups):
                    end = begin + parquet.metadata.row_group(group).num_rows
                    wanted = [r for r in range(begin, end) if is_wanted(r)]
                    if wanted:
                        table = parquet.read_row_group(group, columns=columns)
                        for r in wanted:
                            yield r, self._row_of([cell_value(table.column(name)[r - begin]) for name in columns])
                    begin = end
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data.source: {path} cannot be read as parquet: {error}") from error

    def _columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a parquet file from which `_row_of` makes a row."""
        return [self.text_column]

    def _row_of(self, values: list[Any]) -> Row:
        """Makes a row from the values of `_columns`."""
        return values[0] if isinstance(values[0], Row) else text_row(values[0])

    def _check_parquet(self, path: Path) -> None:
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data.source: {path} cannot be read as parquet: {error}") from error
        self._check_columns(path, names)

    def _check_columns(self, path: Path, names: Sequence[str]) -> None:
        if self.text_column not in names:
            raise UserError(f"data.text_column is {self.text_column!r}; {path} has the columns: {', '.join(names)}")


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

    def identity(self) -> list:
        return ["synthetic", self.corpus.num_tokens, self.corpus.num_needles]

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        return {row: Row(self.corpus.document(row)) for row in numbers}

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        row = first_row
        while True:
            yield row, Row(self.corpus.document(row))
            row += stride


def build_source(data: Data, tokenizer, seq_len: int, seed: int) -> DocumentSource:
    """Builds the source that `[data] source` names.

    Raises:
        UserError: the path does not exist or holds no readable file, or a parquet file lacks the column.
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
    path = Path(data.source).expanduser()
    if is_prepared(path):
        return _prepared_source(path, data, tokenizer, seq_len)
    if path.is_file():
        if path.suffix == ".parquet" and is_prepared(path.parent):
            raise UserError(f"data.source is {data.source!r}, a part of prepared data; name the folder that holds {MANIFEST}")
        if path.suffix not in (*FILE_SUFFIXES, *data.folder_suffixes):
            raise UserError(f"data.source is {data.source!r}; allowed files end in {', '.join(FILE_SUFFIXES)}")
        return FileSource([path], data.text_column, path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in data.folder_suffixes)
        if not files:
            raise UserError(f"data.source: the folder {path} holds no file ending in {', '.join(data.folder_suffixes)}")
        return FileSource(files, data.text_column, path)
    raise UserError(f"data.source is {data.source!r}: no such file or folder; or use 'python-stdlib' or 'synthetic'")


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


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"data.source: {path} cannot be read: {error.strerror}") from error
