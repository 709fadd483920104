"""The footer of a parquet file: where its columns lie. It is read and checked here, and not by asking pyarrow.

A damaged footer may make pyarrow 26.0.1 end the process (`RowGroupMetaData.column` aborts where size statistics contradict the schema), and
one of 8 MB may make it take 2 GB. https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift has the structs.
"""

import io
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet

from refine_titan.data.thrift import ThriftReader, TooMuchMemory
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_FILE_MIB, MAX_JSON_MIB

MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
# The length of the footer and MAGIC, at the end of a file.
TAIL_BYTES = 8
# Memory that an entry of the footer takes (an element of the schema, a row group, a column of one): 1,190 bytes in pyarrow at most.
ENTRY_BYTES = 1280
# Memory that pyarrow takes for a byte of the footer, at most: 240. A footer that may take more than allowed is read here first. Others are
# not, because this is 30 times slower, and each rank opens every file of a data set.
MEMORY_PER_BYTE = 256
# Rows of a row group; writers count them in 32 bits.
MOST_ROWS = (1 << 31) - 1

# Fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_SCHEMA, _GROUPS, _COLUMNS, _NUM_ROWS, _METADATA = 2, 4, 1, 3, 3
_SIZES = {"num_values": 5, "uncompressed": 6, "compressed": 7, "data_page": 9}
_DICTIONARY_PAGE = 11
_KEPT = {
    _SCHEMA: {},
    _GROUPS: {_COLUMNS: {_METADATA: dict.fromkeys((*_SIZES.values(), _DICTIONARY_PAGE))}, _NUM_ROWS: None},
}


class ColumnChunk(NamedTuple):
    """A column in a row group: its number of values, its bytes with and without compression, and where its first page begins."""

    num_values: int
    uncompressed: int
    compressed: int
    begin: int


class RowGroup(NamedTuple):
    """The number of rows of a row group, and its columns in the order of the schema's leaves."""

    num_rows: int
    columns: tuple[ColumnChunk, ...]


class CheckedParquetFile(pyarrow.parquet.ParquetFile):
    """A parquet file whose footer takes bounded memory, and whose metadata of columns do not come from pyarrow."""

    def __init__(self, path: Path, **options: Any):
        """
        Raises:
            OSError: the file cannot be read as parquet.
            UserError: its footer would take more than MAX_JSON_MIB, or MAX_FILE_MIB in memory.
        """
        self._file = path
        with path.open("rb") as file:
            is_large = _footer_bytes(path, file, MAX_JSON_MIB.nbytes) * MEMORY_PER_BYTE > MAX_FILE_MIB.nbytes
        if is_large:
            read_groups(path)
        super().__init__(path, **options)

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The row groups. pyarrow's own metadata of a column must not be asked for: a damaged footer would end the process.

        Raises:
            OSError, UserError: as for `CheckedParquetFile`.
        """
        groups = read_groups(self._file)
        for number, group in enumerate(groups):
            if len(group.columns) != len(self._paths):
                raise OSError(f"row group {number} has {len(group.columns)} columns, the schema has {len(self._paths)}")
        return groups

    @cached_property
    def _paths(self) -> list[str]:
        return [self.schema.column(i).path for i in range(len(self.schema))]

    def column_chunks(self, group: int, column: str) -> list[ColumnChunk]:
        """What a row group has of a column: several chunks if it is nested. These are the ones that pyarrow reads for that name."""
        return [chunk for path, chunk in zip(self._paths, self.groups[group].columns) if path == column or path.startswith(f"{column}.")]


def read_groups(path: Path) -> tuple[RowGroup, ...]:
    """Reads the row groups of a file from its footer.

    Raises:
        OSError, UserError: as for `CheckedParquetFile`.
    """
    found = path.stat()
    return _read_groups(path, (found.st_ino, found.st_size, found.st_mtime_ns), MAX_JSON_MIB.nbytes, MAX_FILE_MIB.nbytes)


# Rows that are read again open their file each time.
@lru_cache(maxsize=4)
def _read_groups(path: Path, _version: tuple[int, ...], max_bytes: int, max_memory: int) -> tuple[RowGroup, ...]:
    with path.open("rb") as file:
        nbytes = _footer_bytes(path, file, max_bytes)
        file.seek(-TAIL_BYTES - nbytes, io.SEEK_END)
        footer = file.read(nbytes)
    try:
        fields = ThriftReader(io.BytesIO(footer), nbytes, max_memory, ENTRY_BYTES).struct(_KEPT)
        return tuple(_row_group(group) for group in _items(fields, _GROUPS))
    except TooMuchMemory as error:
        raise UserError(f"{path}: its footer takes more memory than allowed: {MAX_FILE_MIB.words(' MiB')}") from error
    except ValueError as error:
        raise OSError(f"its footer is damaged: {error}") from error


def _footer_bytes(path: Path, file: BinaryIO, most: int) -> int:
    """The length of a file's footer; OSError if it has none, UserError if it has more than `most` bytes."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    if tail[4:] != MAGIC:
        raise OSError("it is encrypted" if tail[4:] == ENCRYPTED_MAGIC else f"it does not end with {MAGIC.decode()}")
    nbytes = int.from_bytes(tail[:4], "little")
    if nbytes > size - TAIL_BYTES:
        raise OSError(f"its footer is said to have {nbytes:,} bytes, the file has {size:,}")
    if nbytes > most:
        raise UserError(f"{path}: its footer has {nbytes:,} bytes; allowed: {MAX_JSON_MIB.words(' MiB')}")
    return nbytes


def _row_group(fields: Any) -> RowGroup:
    columns = [_column_chunk(column) for column in _items(fields, _COLUMNS)]
    num_rows, fewest = _size(fields, "num_rows", _NUM_ROWS), min((column.num_values for column in columns), default=0)
    if num_rows > min(fewest, MOST_ROWS):  # nulls and empty lists count as values
        raise ValueError(f"a row group is said to have {num_rows:,} rows, a column of it has {fewest:,} values")
    return RowGroup(num_rows, tuple(columns))


def _column_chunk(fields: Any) -> ColumnChunk:
    found = fields.get(_METADATA) if isinstance(fields, dict) else None
    if not isinstance(found, dict):
        raise ValueError("a column without metadata")
    sizes = {name: _size(found, name, number) for name, number in _SIZES.items()}
    # The dictionary's page lies before the others if there is one; pyarrow looks for the first page in the same way.
    begin, dictionary = sizes.pop("data_page"), found.get(_DICTIONARY_PAGE)
    if isinstance(dictionary, int) and 0 < dictionary < begin:
        begin = dictionary
    return ColumnChunk(begin=begin, **sizes)


def _items(fields: Any, number: int) -> list:
    found = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(found, list):
        raise ValueError("no list where one belongs")
    return found


def _size(fields: dict[int, Any], name: str, number: int) -> int:
    found = fields.get(number)
    if not isinstance(found, int) or found < 0:
        raise ValueError(f"{name} is {found}")
    return found
