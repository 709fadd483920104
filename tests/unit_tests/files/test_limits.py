"""A small file that asks for much memory or time is refused, or its row skipped, with the file, what was found, and the setting named."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models

from refine_titan.benchmarks.response_files import score_file
from refine_titan.benchmarks.task_files import TaskFileReader
from refine_titan.data import data_files
from refine_titan.data.file_source import FileSource
from refine_titan.data.rows import TextReader
from refine_titan.data.shards import read_manifest
from refine_titan.data.tokenizer import load_tokenizer
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_LAYERS, MAX_ROW_MIB, read_line, read_small_file
from refine_titan.models import FAMILIES
from refine_titan.models.model_config import ModelConfig
from refine_titan.preparation.inputs import InputFile, read_segment, take_inventory
from refine_titan.preparation.settings import Settings
from refine_titan.report.records import read_object

MIB = 1 << 20


def test_variable_sets_a_limit_and_has_to_be_a_number(monkeypatch):
    assert MAX_LAYERS.value == MAX_LAYERS.default == 512
    monkeypatch.setenv(MAX_LAYERS.variable, "0007")
    assert MAX_LAYERS.value == 7
    for text in ("", "0", "-1", "1.5", "many", "\u0664", "1" * 30):
        monkeypatch.setenv(MAX_LAYERS.variable, text)
        with pytest.raises(UserError, match="REFINE_TITAN_MAX_LAYERS is .* allowed: whole numbers above 0"):
            _ = MAX_LAYERS.value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [513, 20_000, 2**30])
def test_layers_of_a_config_are_bounded(tmp_path, family, layers, monkeypatch):
    config = FAMILIES[family].flavors["debug"].to_hf_config()
    for part in (config, config.get("text_config", {})):
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = layers
            part.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config.json: num_hidden_layers is {layers}; allowed: at most 512, .*_MAX_LAYERS"):
        ModelConfig.read(tmp_path)
    if layers == 513:
        monkeypatch.setenv("REFINE_TITAN_MAX_LAYERS", "600")
        assert ModelConfig.read(tmp_path).args.n_layers == layers


def test_json_files_have_to_be_regular_and_small(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_TITAN_MAX_JSON_MIB", "1")
    (tmp_path / "large.json").write_text(json.dumps({"a": "x" * (2 * MIB)}))
    (tmp_path / "device.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    found = {"large": r"large.json has 2,\d+,\d+ bytes; allowed: at most 1 MiB, or .* REFINE_TITAN_MAX_JSON_MIB says"}
    found |= {"device": "is a device, not a regular file", "pipe": "is a pipe, not a regular file", "folder": "is a folder, not a"}
    for name, message in found.items():
        path = tmp_path / f"{name}.json"
        readers = [read_small_file, read_object] + ([ModelConfig.read] if name != "folder" else [])
        for read in readers:
            with pytest.raises(UserError, match=f"{name}.json.*{message.removeprefix(f'{name}.json')}"):
                read(path)
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="manifest.json is a device"):
        read_manifest(tmp_path)


def saved(folder, **changes):
    content = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


BPE = {"type": "BPE", "dropout": None, "unk_token": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
ANY_DOUBLING = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "tokenizer.json cannot be read: Precompiled"),  # a panic
        (
            {"model": BPE | {"continuing_subword_prefix": "abcdef", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}},
            "tokenizer.json cannot be read: range end index",  # a panic
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 40}}, "makes more than 1,000 characters of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [ANY_DOUBLING] * 12}}, "REFINE_TITAN_MAX_EXPANSION"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 10**6}}, "makes more than 1,000 characters"),
        ({"decoder": {"type": "Sequence", "decoders": [DOUBLING] * 40}}, "makes more than 1,000 characters of one"),
    ],
)
def test_tokenizer_that_panics_or_grows_without_end_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^--tokenizer: .*{message}"):
        load_tokenizer(saved(tmp_path, **changes), "--tokenizer")


def test_tokenizer_that_panics_later_is_named(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0}), "--tokenizer")
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} fails: chunk size must be non-zero"):
        tokenizer.encode("a b")
    tokenizer = load_tokenizer(saved(tmp_path, decoder={"type": "Strip", "content": "a", "start": 9, "stop": 10**6}), "--tokenizer")
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} fails: index out of bounds"):
        tokenizer.decode([0, 1])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_tokenizer_file_that_is_a_device_is_refused(tmp_path, name):
    if name != "tokenizer.json":
        saved(tmp_path)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"model.hf_assets_path: .*/{name} is a device, not a regular file"):
        load_tokenizer(str(tmp_path), "model.hf_assets_path")


def rows_of(path) -> list:
    source = FileSource([path], TextReader("text"), path.parent)
    found = [row for _, row in source.rows(0, 0)]
    assert source.num_rows(0) == len(found)
    return found


def prepared_rows(path) -> list:
    file, settings = InputFile(path.name, path), Settings()
    inventory = take_inventory(file, settings, 1 << 16)
    found = [row for segment in inventory.segments for row in read_segment(file, segment, settings)]
    assert [number for number, _ in found] == list(range(inventory.rows))
    return [row for _, row in found]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_line_without_end_is_skipped_and_said(tmp_path, monkeypatch, caplog, suffix):
    monkeypatch.setenv(MAX_ROW_MIB.variable, "1")
    lines = [json.dumps({"text": text}).encode() for text in ("a", "b" * 3 * MIB, "c")]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes((gzip.compress if suffix else bytes)(b"\n".join(lines)))
    reason = "more than 1 MiB (REFINE_TITAN_MAX_ROW_MIB)"
    assert [(row.text, row.skip_reason) for row in rows_of(path)] == [("a", ""), (None, reason), ("c", "")]
    assert f"{path}, line 2 has 3,145,741 bytes and is skipped; allowed: at most 1 MiB, or" in caplog.text
    caplog.clear()
    first, second, third = prepared_rows(path)
    assert (first, second.skip_reason, third) == (["a"], reason, ["c"])
    assert f"{path}, line 2 has 3,145,741 bytes" in caplog.text


def test_read_line_keeps_its_place(tmp_path):
    path = tmp_path / "lines"
    contents = [b"x" * 9 + b"\n", b"x" * 10 + b"\n", b"x" * 11 + b"\n", b"\n", b"x" * 3_000_000 + b"\n", b"x" * 12]
    path.write_bytes(b"".join(contents))
    with path.open("rb") as file:
        found = [read_line(file, 10) for _ in range(7)]
    assert [line.nbytes for line in found] == [*map(len, contents), 0]
    assert [line.content for line in found] == [contents[0], None, None, b"\n", None, None, b""]
    assert [line.is_complete for line in found] == [True] * 5 + [False] * 2


@pytest.mark.parametrize("options", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}, {"write_statistics": False}])
def test_page_of_a_parquet_file_is_bounded_before_it_is_decompressed(tmp_path, monkeypatch, options):
    monkeypatch.setenv("REFINE_TITAN_MAX_PAGE_MIB", "1")
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a", "b" * 3 * MIB], "other": ["c" * 5 * MIB, ""], "prompt": ["p", "q"], "answers": [["a"], ["b"]]})
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    assert path.stat().st_size < 20_000
    message = r"rows.parquet: a page of column text, in row group 0, has 3,\d+,\d+ bytes; allowed: at most 1 MiB, .*_MAX_PAGE_MIB"
    for read in (rows_of, prepared_rows):
        with pytest.raises(UserError, match=message):
            read(path)
    samples = list(TaskFileReader(path, "longbench", "hotpotqa").samples())  # the columns that it reads are small
    assert [sample.prompt for sample in samples] == ["p", "q"]


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_cell_above_the_limit_is_skipped(tmp_path, monkeypatch, is_dictionary):
    monkeypatch.setenv(MAX_ROW_MIB.variable, "1")
    column = pyarrow.array(["a", "b" * 3 * MIB, None])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column.dictionary_encode() if is_dictionary else column}), path)
    assert [(row.text, row.skip_reason[:15]) for row in rows_of(path)] == [("a", ""), (None, "more than 1 MiB"), (None, "null")]
    assert [row if isinstance(row, list) else row.skip_reason[:15] for row in prepared_rows(path)] == [["a"], "more than 1 MiB", [None]]


def test_rows_that_share_a_large_entry_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    """128 rows of one dictionary entry of 1 MiB would be 128 MiB at once."""
    monkeypatch.setenv("REFINE_TITAN_MAX_FILE_MIB", "4")
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * (MIB - 100)] * 128}), path)
    sizes, read = [], pyarrow.parquet.ParquetFile.iter_batches

    def recorded(*args, **kwargs):
        for batch in read(*args, **kwargs):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", recorded)
    assert len(rows_of(path)) == 128 and max(sizes) <= 4


def test_damaged_page_header_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 100] * 10}), path)
    content = bytearray(path.read_bytes())
    for byte in (0xFF, 0x1C, 0x19):
        content[4:24] = bytes([byte]) * 20
        path.write_bytes(content)
        with pytest.raises(UserError, match="rows.parquet cannot be read as parquet"):
            rows_of(path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.txt.gz", "rows.json.gz"])
def test_compressed_file_that_expands_without_end_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_files, "SMALL_CONTENT", MIB)
    monkeypatch.setenv("REFINE_TITAN_MAX_EXPANSION", "300")
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * (1 << 20)))
    with pytest.raises(UserError, match=rf"{name} holds more than [\d,]+ bytes, 300 times its size; allowed: .*MAX_EXPANSION"):
        rows_of(path)
    with pytest.raises(UserError, match=f"{name} holds more than"):
        prepared_rows(path)


@pytest.mark.parametrize("name", ["rows.txt", "rows.json"])
def test_file_that_is_read_whole_is_bounded(tmp_path, monkeypatch, name):
    monkeypatch.setenv("REFINE_TITAN_MAX_FILE_MIB", "1")
    (tmp_path / name).write_text("[" + " " * 2 * MIB + "]")
    with pytest.raises(UserError, match=f"{name} holds more than 1,048,576 bytes; allowed: at most 1 MiB, or .*REFINE_TITAN_MAX_FILE_MIB"):
        rows_of(tmp_path / name)


def test_long_lines_of_tasks_are_skipped_and_of_responses_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(MAX_ROW_MIB.variable, "1")
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * size, "answers": ["a"]}) + "\n" for size in (3, 2 * MIB, 4)))
    reader = TaskFileReader(path, "longbench", "hotpotqa")
    assert [(sample.index, sample.prompt) for sample in reader.samples()] == [(0, "xxx"), (2, "xxxx")]
    assert reader.skipped == {"more than 1 MiB (REFINE_TITAN_MAX_ROW_MIB)": 1}
    path.write_text(json.dumps({"response": "x" * 2 * MIB}) + "\n")
    with pytest.raises(UserError, match=r"hotpotqa.jsonl, line 1: 2,\d+,\d+ bytes; allowed: at most 1 MiB, or .*REFINE_TITAN_MAX_ROW_MIB"):
        list(score_file(path))


BOMBS = """
import gzip, re, sys
from pathlib import Path
from refine_titan.data.file_source import FileSource
from refine_titan.data.rows import TextReader
from refine_titan.errors import UserError
found = []
for path in map(Path, sys.argv[1:]):
    try:
        found.append([row.skip_reason for _, row in FileSource([path], TextReader("text"), path.parent).rows(0, 0)])
    except UserError as error:
        found.append(str(error))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024, found)
"""


@pytest.mark.slow
def test_bombs_of_full_size_need_little_memory(tmp_path):
    """A line of 300 MB, a cell of 1.2 GB in 37 KB, and 20 GB of text in 20 MB."""
    line, cell, text = tmp_path / "line.jsonl", tmp_path / "cell.parquet", tmp_path / "text.jsonl.gz"
    with line.open("wb") as file:
        file.write(b'{"text": [')
        for _ in range(100):
            file.write(b"[],[]," * 500_000)
        file.write(b"0]}\n")
    column = pyarrow.array(["x" * 1_200_000_000], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), cell, compression="zstd", write_statistics=False, use_dictionary=False)
    del column
    member = gzip.compress(b"\0" * (100 << 20))
    with text.open("wb") as file:
        for _ in range(200):
            file.write(member)
    result = subprocess.run([sys.executable, "-c", BOMBS, line, cell, text], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    mebibytes, found = result.stdout.split(" ", 1)
    assert int(mebibytes) < 800, result.stdout
    assert "more than 64 MiB" in found and "a page of column text" in found and "1,000 times its size" in found
