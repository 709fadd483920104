"""The footer of a parquet file, read by Thrift's protocol before pyarrow reads it."""

import io
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from refine_titan.data.data_files import reading
from refine_titan.data.file_source import FileSource
from refine_titan.data.parquet_footer import CheckedParquetFile, read_groups
from refine_titan.data.question_rows import QuestionReader
from refine_titan.data.rows import TextReader
from refine_titan.data.thrift import ThriftReader
from refine_titan.errors import UserError

MIB = 1 << 20


def table(rows: int) -> pyarrow.Table:
    pairs = pyarrow.array([{"a": "x", "b": i} for i in range(rows)], pyarrow.struct([("a", pyarrow.string()), ("b", pyarrow.int64())]))
    return pyarrow.table({"text": ["é" * 40] * rows, "pair": pairs, "pair.a": [1.5] * rows, "lists": [["a", "b"], [], None] * (rows // 3)})


def number(value: int) -> bytes:
    """A number without sign in the protocol."""
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def items(kind: int, content: bytes, count: int) -> bytes:
    """A list of equal items."""
    return bytes([0xF0 | kind]) + number(count) + content * count


# An element of the schema with the name a: the root, which has one child, and a leaf of 32-bit integers.
ROOT, LEAF = b"\x48\x01a\x15\x02\x00", b"\x15\x02\x25\x02\x18\x01a\x00"
# A column in a row group: its metadata with 1 value, 0 bytes in and out, and the first page at byte 4.
COLUMN = b"\x3c\x56\x02\x16\x00\x16\x00\x26\x08\x00\x00"


def footer(groups: bytes, schema: bytes = b"\x2c" + ROOT + LEAF) -> bytes:
    return b"\x15\x02\x19" + schema + b"\x16\x00\x19" + groups + b"\x00"


def group(columns: bytes, rows: bytes = b"\x02") -> bytes:
    return b"\x19" + columns + b"\x16\x00\x16" + rows + b"\x00"


def write(path: Path, content: bytes, tail: bytes = b"PAR1") -> Path:
    path.write_bytes(b"PAR1" + content + len(content).to_bytes(4, "little") + tail)
    return path


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0", "compression": "zstd"}])
def test_groups_are_those_that_pyarrow_reads(tmp_path, options):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table(30), path, row_group_size=7, write_page_index=True, **options)
    expected = pyarrow.parquet.read_metadata(path).to_dict()["row_groups"]
    found = read_groups(path)
    assert [group.num_rows for group in found] == [7, 7, 7, 7, 2] == [group["num_rows"] for group in expected]
    for ours, theirs in zip(found, expected):
        for chunk, column in zip(ours.columns, theirs["columns"], strict=True):
            begins = [offset for offset in (column["dictionary_page_offset"], column["data_page_offset"]) if offset is not None]
            names = ("num_values", "total_uncompressed_size", "total_compressed_size")
            assert chunk == (*(column[name] for name in names), min(begins))


def test_columns_are_found_by_their_names(tmp_path):
    """A struct has one chunk for each of its fields; the name of a column may have a dot."""
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table(3), path)
    with CheckedParquetFile(path) as parquet:
        (group,) = parquet.groups
        assert parquet.column_chunks(0, "text") == [group.columns[0]]
        assert parquet.column_chunks(0, "pair") == [*group.columns[1:4]]
        assert parquet.column_chunks(0, "pair.a") == [group.columns[1], group.columns[3]]
        assert parquet.column_chunks(0, "tex") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x15\x02\x00", "no list where one belongs"),
        (footer(b"\x1c" + group(b"\x1c\x00")), "a column without metadata"),
        (footer(b"\x1c" + group(b"\x1c" + COLUMN.replace(b"\x56\x02", b"\x56\x01"))), "num_values is -1"),
        (footer(b"\x1c" + group(b"\x1c" + COLUMN, rows=b"\x04")), "said to have 2 rows, a column of it has 1 values"),
        (footer(b"\x1c" + group(b"\x1c" + COLUMN, rows=b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x7f")), "a number of more than 64 bits"),
        (
            footer(b"\x1c" + group(b"\x1c" + COLUMN + b"")).replace(b"\x16\x00\x19\x1c", b"\x16\x00\x19\xfc\xff\xff\xff\x7f"),
            "beyond the end",
        ),
        (b"\x19\xfc\xff\xff\xff\xff\x07", "a length beyond the end"),
        (b"\x18\xff\xff\x03", "a length beyond the end"),
        (b"\x1c" * 100, "nested too deeply"),
        (b"\x19\x19" * 100, "nested too deeply"),
        (b"\x1f", "type 15, which Thrift does not have"),
        (footer(b"\x1c" + group(b"\x1c" + COLUMN))[:-1] + b"\x09\x08\x1c\x00\x00", "field 4 twice"),
        (b"\x15" + b"\xff" * 20, "a number without end"),
        (b"", "the file ends"),
    ],
)
def test_damaged_footer_is_refused(tmp_path, content, problem):
    path = write(tmp_path / "rows.parquet", content)
    with pytest.raises(UserError, match=rf"rows.parquet cannot be read as parquet: its footer is damaged: .*{problem}"), reading(path):
        read_groups(path)
    with pytest.raises(UserError, match="rows.parquet cannot be read as parquet: "):
        list(FileSource([path], TextReader("a"), path).rows(0, 0))


def test_row_group_without_columns_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", footer(b"\x1c" + group(b"\x0c", b"\x00")))
    with pytest.raises(OSError, match="row group 0 has 0 columns, the schema has 1"):
        _ = CheckedParquetFile(path).groups


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    for content, problem in ((b"", "not end with PAR1"), (b"x" * 99, "not end with PAR1"), (b"\xff\xff\xff\x7fPAR1", "is said to have 2,")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot be read as parquet: .*{problem}"):
            FileSource([path], TextReader("text"), path)
    with pytest.raises(UserError, match="cannot be read as parquet: it is encrypted"):
        FileSource([write(path, footer(b"\x0c"), b"PARE")], TextReader("text"), path)


@pytest.mark.parametrize(
    "content",
    [
        footer(items(12, group(items(12, COLUMN, 10_000)), 10)),
        footer(b"\x0c", items(12, LEAF, 60_000)),
        footer(items(12, group(b"\x0c", b"\x00"), 60_000)),
        b"\x29" + items(8, b"\x00", 3_000_000),
    ],
    ids=["columns", "schema", "groups", "texts"],
)
def test_footer_takes_bounded_memory(tmp_path, monkeypatch, content):
    """pyarrow makes up to 1.2 kB of each of these few bytes."""
    monkeypatch.setenv("REFINE_TITAN_MAX_FILE_MIB", "64")
    path = write(tmp_path / "rows.parquet", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="its footer takes more memory than allowed: at most 64 MiB, or .*REFINE_TITAN_MAX_FILE_MIB"):
        FileSource([path], TextReader("text"), path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_length_of_a_footer_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_TITAN_MAX_JSON_MIB", "1")
    path = write(tmp_path / "rows.parquet", b"x" * 2 * MIB)
    with pytest.raises(UserError, match="its footer has 2,097,152 bytes; allowed: at most 1 MiB, or .*REFINE_TITAN_MAX_JSON_MIB"):
        read_groups(path)


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    path = tmp_path / "rows.parquet"
    for rows in (3, 6):
        pyarrow.parquet.write_table(table(rows), path)
        assert [group.num_rows for group in read_groups(path)] == [rows]


def test_maps_and_other_types_are_skipped():
    fields = b"\x1b\x02\x85\x01a\x02\x01b\x04" + b"\x17" + b"d" * 8 + b"\x13\x07" + b"\x11\x12" + b"\x1b\x00" + b"\x15\x09\x00"
    assert ThriftReader(io.BytesIO(fields), len(fields)).struct({7: None}) == {7: -5}


def test_process_survives_a_footer_that_contradicts_itself(tmp_path):
    """The metadata of a column, which pyarrow is never asked for, ends the process; the rows are refused or read."""
    path = tmp_path / "rows.parquet"
    content = pyarrow.table({"text": ["a", "b", None, "é" * 40], "prompt": list("wxyz"), "answers": [["a"], [], None, ["b", None]]})
    pyarrow.parquet.write_table(content, path, row_group_size=2)
    damaged = bytearray(path.read_bytes())
    damaged[523], damaged[619] = 158, 46
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="rows.parquet cannot be read as parquet: Definition level histogram size mismatch"):
        list(FileSource([path], QuestionReader("prompt", "answers"), path).rows(0, 0))
    code = "import sys, pyarrow.parquet; pyarrow.parquet.read_metadata(sys.argv[1]).to_dict()"
    died = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert died.returncode < 0 and "histogram size mismatch" in died.stderr  # if not, pyarrow's own metadata may be asked for
