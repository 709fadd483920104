"""Data: jsonl and parquet rows of any kind, read by everything that reads rows."""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from refine_titan.benchmarks.task_files import TaskFileReader
from refine_titan.data.file_source import FileSource
from refine_titan.data.question_rows import QuestionReader
from refine_titan.data.rows import RowReader, TextReader
from refine_titan.errors import UserError
from refine_titan.preparation.inputs import find_inputs, read_segment, take_inventory
from refine_titan.preparation.settings import Settings
from tests.unit_tests.nonsense.judge import counts, for_all, works_or_is_refused, write

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**63, -(2**70), 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["\ud800", "\x00", "\u2028", " ", "é漢"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["role", "content", "text", "é", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["text", "prompt", "answers", "answer", "benchmark", "task", "max_new_tokens", "max_seq_length", "other"]
OBJECTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
LINES = st.one_of(
    OBJECTS.map(json.dumps),
    VALUES.map(json.dumps),
    st.text('{}[]":,1e9é\\u \r\t', max_size=30),
    st.binary(max_size=30),
    st.sampled_from(["[" * 5000, '{"text": ' * 3000, '{"text": 1' + "0" * 5000 + "}", "\ufeff{}", ""]),
)


def read_everything(path: Path, kind: str) -> None:
    """Reads a file as documents, as questions, as a task, and for preparation."""
    read_source(path, kind, TextReader("text"))
    read_source(path, kind, QuestionReader("prompt", ""))
    with works_or_is_refused(kind):
        reader = TaskFileReader(path, "longbench", "hotpotqa")
        list(reader.samples())
    for settings in (Settings(), Settings(kind="questions")):
        with works_or_is_refused(kind):
            [file] = find_inputs([path], settings)
            inventory = take_inventory(file, settings, 50)
            rows = [row for segment in inventory.segments for row in read_segment(file, segment, settings)]
            assert [number for number, _ in rows] == list(range(inventory.rows))


def read_source(path: Path, kind: str, reader: RowReader) -> None:
    with works_or_is_refused(kind):
        source = FileSource([path], reader, path)
        count = source.num_rows(0)
        rows = dict(source.rows(0, 0))
        assert list(rows) == list(range(count))
        assert source.rows_again(0, set(rows)) == rows
        source.identity(), source.description()
        for row in rows.values():
            assert (row.text is None) == bool(row.skip_reason)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@counts(60, 3000)
def test_jsonl(place, count):
    def check(lines: list) -> None:
        content = b"\n".join(line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines)
        read_everything(write(place / "hotpotqa.jsonl", content), "jsonl")

    for_all(st.lists(LINES, max_size=5), count, check)


@counts(30, 1500)
def test_compressed_jsonl(place, count):
    """The bytes of a compressed file, damaged."""
    whole = pyarrow.compress(b'{"text": "a", "prompt": "b", "answers": ["c"]}\n' * 50, "gzip", asbytes=True)

    def check(changes: list) -> None:
        content = bytearray(whole)
        for at, value in changes:
            content[at % len(content)] = value
        read_everything(write(place / "hotpotqa.jsonl.gz", bytes(content)), "jsonl.gz")

    for_all(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3), count, check)


TYPES = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.binary(),
    pyarrow.int64(),
    pyarrow.float64(),
    pyarrow.bool_(),
    pyarrow.null(),
    pyarrow.timestamp("ns"),
    pyarrow.decimal128(30, 2),
    pyarrow.list_(pyarrow.string()),
    pyarrow.list_(pyarrow.int64()),
    pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]),
    pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
    pyarrow.map_(pyarrow.string(), pyarrow.int64()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]


def column(kind: pyarrow.DataType, rows: int, text: bytes) -> pyarrow.Array:
    """Values of a type: text that need not be UTF-8, numbers at the edge, and a null in between."""
    words = pyarrow.array([None if i == 1 else text for i in range(rows)], pyarrow.binary())
    if pyarrow.types.is_binary(kind):
        return words
    if pyarrow.types.is_string(kind):
        return pyarrow.Array.from_buffers(kind, rows, words.buffers())
    samples = {
        "int64": 2**63 - 1,
        "double": float("nan"),
        "bool": True,
        "timestamp[ns]": -(2**63) + 1,
        "decimal128(30, 2)": Decimal(10**27),
    }
    if str(kind) in samples:
        values = pyarrow.array([samples[str(kind)]] * rows, pyarrow.int64() if "timestamp" in str(kind) else None)
        return values.cast(kind) if "timestamp" not in str(kind) else values.view(kind)
    name = text.decode("utf-8", "replace")
    message = {"role": "user", "content": name}
    if pyarrow.types.is_list(kind):
        item = kind.value_type
        inner = message if pyarrow.types.is_struct(item) else 7 if pyarrow.types.is_integer(item) else name
        return pyarrow.array([None if i == 1 else [inner, None] for i in range(rows)], kind)
    if pyarrow.types.is_struct(kind):
        return pyarrow.array([None if i == 1 else message for i in range(rows)], kind)
    if pyarrow.types.is_map(kind):
        return pyarrow.array([None if i == 1 else [(name, 1)] for i in range(rows)], kind)
    return pyarrow.array([None if i == 1 or pyarrow.types.is_null(kind) else name for i in range(rows)]).cast(kind)


COLUMNS = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(TYPES), min_size=1, max_size=5)
TABLES = st.tuples(
    COLUMNS, st.integers(0, 4), st.one_of(st.sampled_from([b"", b"\xff", b" ", "é".encode(), b"hotpotqa"]), st.binary(max_size=9))
)


@counts(60, 3000)
def test_parquet(place, count):
    def check(table: tuple) -> None:
        columns, rows, text = table
        path = place / "hotpotqa.parquet"
        content = pyarrow.table({name: column(kind, rows, text) for name, kind in columns.items()})
        pyarrow.parquet.write_table(content, path, row_group_size=2)
        read_everything(path, "parquet: types")

    for_all(TABLES, count, check)


@counts(60, 3000)
def test_damaged_parquet(place, count):
    path = place / "hotpotqa.parquet"
    table = pyarrow.table({"text": ["a", "b", None, "é" * 40], "prompt": list("wxyz"), "answers": [["a"], [], None, ["b", None]]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    whole = path.read_bytes()

    def check(changes: list) -> None:
        content = bytearray(whole)
        for at, value in changes:
            content[at % len(content)] = value
        read_everything(write(path, bytes(content)), "parquet: bytes")

    for_all(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=3), count, check)


@pytest.mark.parametrize("changes", [[(432, 128)], [(4, 0x51)], [(519, 1)], [(523, 158), (619, 46)]])
def test_damaged_bytes_that_property_tests_have_found(place, changes):
    """A size that is no number; one where a struct belongs; a page of which pyarrow reads no row, without a word; a footer whose size
    statistics contradict the schema, with which pyarrow ends the process if it is asked for the metadata of a column."""
    path = place / "hotpotqa.parquet"
    table = pyarrow.table({"text": ["a", "b", None, "é" * 40], "prompt": list("wxyz"), "answers": [["a"], [], None, ["b", None]]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    content = bytearray(path.read_bytes())
    for at, value in changes:
        content[at] = value
    read_everything(write(path, bytes(content)), "parquet: bytes")


def test_parquet_file_of_no_rows(place):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "bool")}), place / "hotpotqa.parquet", row_group_size=2)
    read_everything(place / "hotpotqa.parquet", "parquet: types")


def test_parquet_file_whose_footer_contradicts_itself_is_refused(place):
    """A byte of the footer: without a check, rows were lost without a word."""
    path = place / "hotpotqa.parquet"
    table = pyarrow.table({"text": ["a", "b", None, "é" * 40], "prompt": list("wxyz"), "answers": [["a"], [], None, ["b", None]]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    whole, contradictions = path.read_bytes(), 0
    for at in range(len(whole) // 4, len(whole) - 8):
        content = bytearray(whole)
        content[at] = 1
        try:
            metadata = pyarrow.parquet.read_metadata(write(path, bytes(content)))
            rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError):
            continue
        if rows != metadata.num_rows:
            contradictions += 1
            with pytest.raises(UserError, match="is damaged: it says that it has|cannot be read as parquet"):
                FileSource([path], TextReader("text"), path)
    assert contradictions > 0
