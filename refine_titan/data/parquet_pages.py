"""What reading a row group of a parquet file costs, from the headers of its pages.

A page is decompressed as a whole, and its header says to how many bytes: a file of 37 KB can hold one of gigabytes. The metadata at the
end of the file say it too, but nothing keeps them from saying something else. A header is a struct in Thrift's compact protocol:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow.parquet

from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_FILE_MIB, MAX_PAGE_MIB

# Types of the compact protocol, in a field's header.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Fields of a page's header, and within the headers of data pages (of version 1 and 2) that of the number of values.
_UNCOMPRESSED, _COMPRESSED, _DATA_PAGE, _DATA_PAGE_V2, _NUM_VALUES = 2, 3, 5, 8, 1
_DEEPEST = 16
# Least bytes of a value in memory.
VALUE_BYTES = 2


class _Page(NamedTuple):
    uncompressed: int
    compressed: int
    num_values: int


def rows_at_once(path: Path, parquet: pyarrow.parquet.ParquetFile, group: int, columns: Collection[str], most: int) -> int:
    """How many rows of a row group to decode at once, so that they take at most MAX_FILE_MIB: `most`, or fewer where pages are large.

    Raises:
        UserError: a page of these columns is larger than MAX_PAGE_MIB, there are more values than MAX_FILE_MIB has room for, or the
            header of a page is damaged.
    """
    metadata, largest = parquet.metadata.row_group(group), 1
    with path.open("rb") as file:
        for i in range(metadata.num_columns):
            column = metadata.column(i)
            if column.path_in_schema.split(".")[0] not in columns:
                continue
            values = 0
            for page in _pages(path, file, column):
                values += page.num_values
                # Equal values of a list take no space in the file.
                if values * VALUE_BYTES > MAX_FILE_MIB.nbytes:
                    raise UserError(
                        f"{path}: column {column.path_in_schema} has {values:,} values and more in row group {group}, of at least "
                        f"{VALUE_BYTES} bytes each; allowed: {MAX_FILE_MIB.words(' MiB')}"
                    )
                if page.uncompressed > MAX_PAGE_MIB.nbytes:
                    raise UserError(
                        f"{path}: a page of column {column.path_in_schema}, in row group {group}, has {page.uncompressed:,} bytes; "
                        f"allowed: {MAX_PAGE_MIB.words(' MiB')}"
                    )
                largest = max(largest, page.uncompressed)
    return max(1, min(most, MAX_FILE_MIB.nbytes // largest))


def group_batches(
    path: Path, parquet: pyarrow.parquet.ParquetFile, group: int, columns: Collection[str], most: int, use_threads: bool = True
) -> Iterator[pyarrow.RecordBatch]:
    """Decodes columns of a row group, at most `most` rows at once; columns beside each other with `use_threads`.

    Raises:
        UserError: as `rows_at_once`; or other rows came than the metadata say, which pyarrow does not notice where a page is damaged.
    """
    expected, found = parquet.metadata.row_group(group).num_rows, 0
    rows = rows_at_once(path, parquet, group, columns, most)
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=use_threads):
        found += batch.num_rows
        yield batch
    if found != expected:
        raise UserError(
            f"{path} is damaged: row group {group} has {expected:,} rows by the file's metadata, and {found:,} were read from it"
        )


def _pages(path: Path, file: BinaryIO, column: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[_Page]:
    """Reads the headers of the pages of a column in a row group."""
    if not column.num_values:  # no page then, and no offset of one
        return
    position = min((offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset), default=0)
    end, values = position + column.total_compressed_size, 0
    while position < end and values < column.num_values:
        try:
            file.seek(position)
            fields = _read_struct(file)
            data = fields.get(_DATA_PAGE) or fields.get(_DATA_PAGE_V2)
            num_values = data.get(_NUM_VALUES, 0) if isinstance(data, dict) else 0
            page = _Page(fields[_UNCOMPRESSED], fields[_COMPRESSED], num_values)
            if not all(isinstance(size, int) and size >= 0 for size in page):
                raise ValueError("no size, or a negative one")
        except (KeyError, ValueError, OverflowError) as error:
            raise UserError(f"{path} cannot be read as parquet: the header of the page at byte {position:,} is damaged") from error
        yield page
        position, values = file.tell() + page.compressed, values + page.num_values


def _read_struct(file: BinaryIO, depth: int = 0) -> dict[int, int | dict]:
    """Reads the whole numbers of a struct and of the structs in it, by their fields' numbers; skips everything else."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    fields, number = {}, 0
    while header := _byte(file):
        number = number + (header >> 4) if header >> 4 else _number(file)
        fields[number] = _read_value(file, header & 15, depth)
    return fields


def _read_value(file: BinaryIO, kind: int, depth: int) -> int | dict | None:
    if kind in (_I16, _I32, _I64):
        return _number(file)
    if kind == _STRUCT:
        return _read_struct(file, depth + 1)
    if kind == _BINARY:
        file.seek(_varint(file), 1)
    elif kind in (_BYTE, _DOUBLE):
        file.seek(1 if kind == _BYTE else 8, 1)
    elif kind not in (_TRUE, _FALSE):
        raise ValueError(f"type {kind}, which no header of a page has")  # lists, sets and maps
    return None


def _byte(file: BinaryIO) -> int:
    found = file.read(1)
    if not found:
        raise ValueError("the file ends")
    return found[0]


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while shift < 64:
        found = _byte(file)
        value |= (found & 127) << shift
        if found < 128:
            return value
        shift += 7
    raise ValueError("a number without end")


def _number(file: BinaryIO) -> int:
    """A signed number, in which the lowest bit is the sign."""
    value = _varint(file)
    return (value >> 1) ^ -(value & 1)
