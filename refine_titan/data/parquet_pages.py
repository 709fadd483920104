"""What reading a row group of a parquet file costs, from the headers of its pages.

A page is decompressed as a whole, and its header says to how many bytes: a file of 37 KB can hold one of gigabytes. The footer of the file
says it too, but nothing keeps it from saying something else.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow

from refine_titan.data.parquet_footer import CheckedParquetFile, ColumnChunk
from refine_titan.data.thrift import ThriftReader
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_FILE_MIB, MAX_PAGE_MIB

# Fields of a page's header, and within the headers of data pages (of version 1 and 2) that of the number of values.
_UNCOMPRESSED, _COMPRESSED, _DATA_PAGE, _DATA_PAGE_V2, _NUM_VALUES = 2, 3, 5, 8, 1
_KEPT = {_UNCOMPRESSED: None, _COMPRESSED: None, _DATA_PAGE: {_NUM_VALUES: None}, _DATA_PAGE_V2: {_NUM_VALUES: None}}
# A header is longer only if it is damaged; pyarrow has the same bound.
_HEADER_BYTES = 16 << 20
# Least bytes of a value in memory.
VALUE_BYTES = 2


class _Page(NamedTuple):
    uncompressed: int
    compressed: int
    num_values: int


def rows_at_once(path: Path, parquet: CheckedParquetFile, group: int, columns: Collection[str], most: int) -> int:
    """How many rows of a row group to decode at once, so that they take at most MAX_FILE_MIB: `most`, or fewer where pages are large.

    Raises:
        UserError: a page of these columns is larger than MAX_PAGE_MIB, there are more values than MAX_FILE_MIB has room for, or the
            header of a page is damaged.
    """
    largest = 1
    with path.open("rb") as file:
        for column in columns:
            for chunk in parquet.column_chunks(group, column):
                largest = max(largest, _largest_page(path, file, chunk, f"column {column}, in row group {group},"))
    return max(1, min(most, MAX_FILE_MIB.nbytes // largest))


def _largest_page(path: Path, file: BinaryIO, chunk: ColumnChunk, where: str) -> int:
    """Bytes of the largest page of a column in a row group, which `where` names in errors; UserError as for `rows_at_once`."""
    largest = values = 0
    for page in _pages(path, file, chunk):
        values += page.num_values
        # Equal values of a list take no space in the file.
        if values * VALUE_BYTES > MAX_FILE_MIB.nbytes:
            raise UserError(
                f"{path}: {where} has {values:,} values and more, of at least {VALUE_BYTES} bytes each; allowed: "
                f"{MAX_FILE_MIB.words(' MiB')}"
            )
        if page.uncompressed > MAX_PAGE_MIB.nbytes:
            raise UserError(f"{path}: a page of {where} has {page.uncompressed:,} bytes; allowed: {MAX_PAGE_MIB.words(' MiB')}")
        largest = max(largest, page.uncompressed)
    if values < chunk.num_values:
        raise UserError(f"{path} is damaged: {where} has {chunk.num_values:,} values by the file's footer, and its pages have {values:,}")
    return largest


def group_batches(
    path: Path, parquet: CheckedParquetFile, group: int, columns: Collection[str], most: int, use_threads: bool = True
) -> Iterator[pyarrow.RecordBatch]:
    """Decodes columns of a row group, at most `most` rows at once; columns beside each other with `use_threads`.

    Raises:
        UserError: as `rows_at_once`; or other rows came than the metadata say, which pyarrow does not notice where a page is damaged.
    """
    expected, found = parquet.groups[group].num_rows, 0
    rows = rows_at_once(path, parquet, group, columns, most)
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=use_threads):
        found += batch.num_rows
        yield batch
    if found != expected:
        raise UserError(f"{path} is damaged: row group {group} has {expected:,} rows by the file's footer, and {found:,} were read from it")


def _pages(path: Path, file: BinaryIO, chunk: ColumnChunk) -> Iterator[_Page]:
    """Reads the headers of the pages of a column in a row group."""
    position, end, values = chunk.begin, chunk.begin + chunk.compressed, 0
    while position < end and values < chunk.num_values:
        try:
            file.seek(position)
            fields = ThriftReader(file, _HEADER_BYTES).struct(_KEPT)
            data = fields.get(_DATA_PAGE) or fields.get(_DATA_PAGE_V2)
            num_values = data.get(_NUM_VALUES, 0) if isinstance(data, dict) else 0
            page = _Page(fields[_UNCOMPRESSED], fields[_COMPRESSED], num_values)
            if not all(isinstance(size, int) and size >= 0 for size in page):
                raise ValueError("no size, or a negative one")
        except (KeyError, ValueError, OverflowError) as error:
            raise UserError(f"{path} cannot be read as parquet: the header of the page at byte {position:,} is damaged") from error
        yield page
        position, values = file.tell() + page.compressed, values + page.num_values
