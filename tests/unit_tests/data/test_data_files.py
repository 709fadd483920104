"""Data as people have it: marks, arrays, compression, suffixes, hidden and linked folders, pointers, and files that change."""

import gzip
import itertools
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from refine_titan.benchmarks.task_files import TaskFileReader
from refine_titan.config.reading import read_config
from refine_titan.config.sections import Data, JobConfig
from refine_titan.data.data_files import compression_of, format_of, list_folder
from refine_titan.data.documents import DocumentStream
from refine_titan.data.fingerprint import BLOCK_BYTES, MAX_BLOCKS, TOTAL_BLOCKS, sampled_fingerprints
from refine_titan.data.questions import build_question_source
from refine_titan.data.sources import build_source
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.files.git_lfs import LFS_POINTER
from refine_titan.preparation.inputs import find_inputs, read_segment, take_inventory
from refine_titan.preparation.settings import Settings

TEXTS = [f"Document {i}: naïve 漢字" for i in range(6)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def source_of(path: Path, **data):
    return build_source(Data(source=str(path), **data), ByteTokenizer(), 100, 0)


def texts(source) -> list[str]:
    return [row.text for file in range(source.num_files()) for _, row in source.rows(file, 0)]


def write_zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


def write_arrow(path: Path, stream: bool) -> None:
    write_batches(path, pyarrow.table({"text": TEXTS}).to_batches(max_chunksize=4), stream)


def write_batches(path: Path, batches: list[pyarrow.RecordBatch], stream: bool) -> None:
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


WRITERS = {
    "marked.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "array.json": lambda path: path.write_bytes(json.dumps([{"text": text} for text in TEXTS]).encode()),
    "marked.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": text} for text in TEXTS]).encode()),
    "UPPER.JSONL": lambda path: path.write_bytes(LINES),
    "packed.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "packed.JSONL.zst": lambda path: write_zst(path, LINES),
    "stream.arrow": lambda path: write_arrow(path, stream=True),
    "file.arrow": lambda path: write_arrow(path, stream=False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_table_is_read_whole(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    source = source_of(path)
    assert texts(source) == TEXTS and source.num_rows(0) == 6
    assert [(i, row.text) for i, row in source.rows(0, 1, stride=2)] == [(i, TEXTS[i]) for i in (1, 3, 5)]
    assert {i: row.text for i, row in source.rows_again(0, {4, 0}).items()} == {0: TEXTS[0], 4: TEXTS[4]}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_kind_of_table_are_those_asked_for(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    source = source_of(path)
    for first, stride in itertools.product(range(8), range(1, 8)):
        assert [i for i, _ in source.rows(0, first, stride)] == list(range(first, 6, stride))
    for numbers in ({0}, {3}, {4}, {5}, {3, 4}, {0, 5}, {2, 9}):
        assert {i: row.text for i, row in source.rows_again(0, numbers).items()} == {i: TEXTS[i] for i in numbers if i < 6}


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "table.parquet"])
def test_a_row_is_found_without_a_look_at_each_row_before_it(tmp_path, name):
    class Numbers(set):
        looks = 0

        def __contains__(self, number: int) -> bool:
            self.looks += 1
            return super().__contains__(number)

    path, table = tmp_path / name, pyarrow.table({"text": [f"Document {i}" for i in range(5000)]})
    if name == "table.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    else:
        write_batches(path, table.to_batches(max_chunksize=1000), name == "stream.arrow")
    numbers = Numbers({4711})
    assert source_of(path).rows_again(0, numbers)[4711].text == "Document 4711" and numbers.looks == 0


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "one byte less", "pointer"])
def test_files_without_their_end_are_named_or_counted(tmp_path, name, damage):
    """A line of jsonl that is cut is skipped and counted; an empty jsonl file holds no rows. All else is an error that names the file."""
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    content = {"empty": b"", "truncated": whole[: len(whole) // 2 - 3], "one byte less": whole[:-1], "pointer": LFS_POINTER + b"v1\n"}
    path.write_bytes(content[damage])
    if format_of(path) == ".jsonl" and compression_of(path) is None and damage != "pointer":
        rows = [row for _, row in source_of(path).rows(0, 0)]
        good, reasons = [row.text for row in rows if row.text], [row.skip_reason for row in rows if row.text is None]
        assert good == TEXTS[: {"empty": 0, "truncated": len(good), "one byte less": 6}[damage]]
        assert reasons == (["not JSON"] if damage == "truncated" else [])
        return
    if name == "stream.arrow" and damage == "one byte less":
        return  # the mark of the end of a stream is optional
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer" if damage == "pointer" else f"data.source: .*{name} "):
        texts(source_of(path))


def test_mark_and_compression_of_a_text_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXTS[0].encode()))
    assert texts(source_of(tmp_path / "a.txt.gz")) == TEXTS[:1]


@pytest.fixture
def folder(tmp_path) -> Path:
    """As in a notebook's folder: compressed and upper-case files, a linked folder, a copy that the notebook keeps, and other things."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "c.JSONL").write_bytes(LINES)
    (elsewhere / "d.jsonl").write_bytes(LINES)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (folder / "notes.ipynb").write_text("{}")
    (folder / "LICENSE").write_text("free")
    return folder


def test_folder_is_read_once_and_says_what_it_leaves_out(folder):
    source = source_of(folder)
    assert [source.file_name(i) for i in range(source.num_files())] == ["a.jsonl", "b.jsonl.gz", "c.JSONL", "linked/d.jsonl"]
    assert texts(source) == TEXTS * 4
    size = sum((folder / source.file_name(i)).stat().st_size for i in range(4))
    assert source.description() == [
        f"4 file(s), {size:,} bytes: a.jsonl, b.jsonl.gz, c.JSONL, d.jsonl",
        "left out, 1 (ends in .ipynb): notes.ipynb",
        "left out, 1 (has no suffix): LICENSE",
        "left out, 1 (hidden): .ipynb_checkpoints",
        "left out, 1 (read already under another name): again",
        f"read through links out of the folder, 1: linked/d.jsonl -> {(folder / 'linked').resolve()}/d.jsonl",
    ]


def test_preparation_reads_the_same_files(folder):
    settings = Settings()
    files = find_inputs([folder], settings)
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz", "c.JSONL", "linked/d.jsonl"]
    for file in files:
        inventory = take_inventory(file, settings, 1 << 20)
        rows = [values for segment in inventory.segments for _, values in read_segment(file, segment, settings)]
        assert rows == [[text] for text in TEXTS]


def test_questions_are_read_from_the_same_kinds_of_tables(tmp_path):
    rows = [{"prompt": f"What is {i}?", "answers": [str(i)]} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name in ("a.json", "b.jsonl.gz"):
        config = JobConfig()
        config.data.source = str(tmp_path / name)
        source = build_question_source(config, ByteTokenizer())
        assert [(row.text, row.answers) for _, row in source.rows(0, 0)] == [(row["prompt"], tuple(row["answers"])) for row in rows]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a.jsonl is a Git LFS pointer, .*git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a.parquet is a Git LFS pointer"),
        ("a.json", b'{"text": "x"}', "a.json holds dict; allowed: one array of objects"),
        ("a.json", b"[1, ", "a.json is not JSON: "),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read as jsonl: "),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "a.jsonl.gz cannot be read as jsonl: "),
        ("a.arrow", b"", "a.arrow cannot be read as arrow: "),
        ("a.arrow", b"\0" * 64, "a.arrow cannot be read as arrow: "),
        ("a.csv", b"text\n1\n", r"allowed files end in .txt, .jsonl, .json, .parquet, .arrow, .md, .* or in one of them and .gz or .zst"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(source_of(tmp_path / name))


def test_other_order_of_lines_is_another_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    before = source_of(path).identity()
    path.write_bytes(b"".join(reversed(LINES.splitlines(keepends=True))))
    assert path.stat().st_size == len(LINES) and source_of(path).identity() != before
    path.write_bytes(LINES)
    assert source_of(path).identity() == before


def test_fingerprint_samples_the_beginning_the_end_and_between(tmp_path):
    path, content = tmp_path / "large", bytearray(MAX_BLOCKS * BLOCK_BYTES * 4)
    path.write_bytes(content)
    fingerprints = set(sampled_fingerprints([path]))
    for place in (0, len(content) - 1, (len(content) - BLOCK_BYTES) * 20 // (MAX_BLOCKS - 1)):
        changed = content.copy()
        changed[place] = 1
        path.write_bytes(changed)
        fingerprints |= set(sampled_fingerprints([path]))
    assert len(fingerprints) == 4


def test_of_many_files_each_is_sampled_less_but_small_ones_whole(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(BLOCK_BYTES))
    large.write_bytes(bytes(4 * BLOCK_BYTES))
    paths = [small, large] * TOTAL_BLOCKS  # one block of each
    before = sampled_fingerprints(paths)
    assert before[:2] == before[2:4] and before[1][0] == 4 * BLOCK_BYTES
    for path, place, is_noticed in ((small, 0, True), (large, 2 * BLOCK_BYTES, True), (large, 0, False)):
        content = bytearray(path.read_bytes())
        content[place] = 1
        path.write_bytes(content)
        after = sampled_fingerprints(paths)
        assert (after != before) == is_noticed, (path, place)
        before = after


def test_the_first_row_of_a_parquet_file_does_not_wait_for_its_row_group(tmp_path):
    rng = random.Random(0)
    texts = [rng.randbytes(4096).hex() for _ in range(4000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    before = pyarrow.total_allocated_bytes()
    rows = source_of(tmp_path / "a.parquet").rows(0, 0)
    assert next(rows)[1].text == texts[0]
    assert pyarrow.total_allocated_bytes() - before < 16 << 20  # the row group has 32 MiB
    assert [row.text for _, row in rows] == texts[1:]


def test_source_whose_rows_have_no_text_says_why(tmp_path):
    path, message = tmp_path / "chat.jsonl", [{"role": "user", "content": "What is it?"}]
    path.write_text(json.dumps({"prompt": message}) + "\n")
    no_key = "1 no key 'text', and 'prompt' is a list of chat messages, which post-training and evaluations read"
    for column, reason in (("text", no_key), ("prompt", "1 a list of chat messages, not text")):
        stream = DocumentStream(
            source_of(path, text_column=column),
            ByteTokenizer(),
            seq_len=100,
            min_tokens=50,
            split_long=False,
            shuffle_buffer=1,
            seed=0,
            number=0,
            num_streams=1,
        )
        with pytest.raises(UserError, match=rf"skipped: {reason}. No row is too short: check data.text_column"):
            stream.next_document()


def test_position_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    settings = dict(seq_len=100, min_tokens=2, split_long=False, shuffle_buffer=1, seed=0, number=0, num_streams=1)
    stream = DocumentStream(source_of(tmp_path / "a.jsonl"), ByteTokenizer(), **settings)
    state = stream.state_dict()
    stream.load_state_dict(state)
    del state["identity"]
    with pytest.raises(UserError, match="data position is of an earlier version.*exclude_from_loading dataloader"):
        stream.load_state_dict(state)


def test_pointers_are_named_by_preparation_and_evaluation_too(tmp_path):
    path = tmp_path / "hotpotqa.parquet"
    path.write_bytes(LFS_POINTER + b"v1\noid sha256:1\n")
    with pytest.raises(UserError, match="hotpotqa.parquet is a Git LFS pointer"):
        take_inventory(find_inputs([path], Settings())[0], Settings(), 1 << 20)
    with pytest.raises(UserError, match="hotpotqa.parquet is a Git LFS pointer"):
        list(TaskFileReader(path, "longbench").samples())


def test_suffixes_are_given_in_lower_case():
    for suffix in (".TXT", "txt", "."):
        with pytest.raises(UserError, match="--suffixes is .* in lower case with their dot"):
            Settings(suffixes=(suffix,))
        with pytest.raises(UserError, match="data.folder_suffixes is .*in lower case with its dot"):
            read_config(["--data.folder_suffixes", suffix])


def test_questions_of_a_json_file_need_their_keys(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "What is it?"}]))
    config = JobConfig()
    config.data.source = str(tmp_path / "a.json")
    with pytest.raises(UserError, match="a.json has neither 'answers' nor 'answer'; it has the columns: prompt"):
        build_question_source(config, ByteTokenizer())


def test_error_names_the_setting_that_gave_the_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    source = build_source(Data(source=str(tmp_path / "a.jsonl.gz")), ByteTokenizer(), 100, 0, "evaluation.perplexity_source")
    with pytest.raises(UserError, match="evaluation.perplexity_source: .*a.jsonl.gz cannot be read as jsonl"):
        texts(source)


def test_formats_and_folders():
    assert [format_of(Path(name)) for name in ("a.JSONL.GZ", "a.b.parquet", "a.zst", "a")] == [".jsonl", ".parquet", "", ""]
    assert list_folder(Path("/nowhere"), [".txt"]).files == []
