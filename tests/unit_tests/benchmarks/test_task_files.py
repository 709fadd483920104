"""Tasks from files: every file at hand, files of other tasks, and rows that cannot be used."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, score
from refine_titan.benchmarks.task_files import LONGBENCH_MAX_NEW_TOKENS, task_of
from refine_titan.benchmarks.tasks import expand_names, load_samples
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.files.git_lfs import LFS_POINTER
from tests.conftest import ORACLES

DATA = ORACLES.parent / "data"
ROW = {"prompt": "Question: who?\nAnswer:", "answers": ["Ada", "Ada L."], "task": "hotpotqa", "max_gen_tokens": 7}


def load(name: str | Path, data_folder: str | Path = "", **settings):
    return load_samples(str(name), tokenizer=ByteTokenizer(), data_folder=str(data_folder), **settings)


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"evaluation data is not at {DATA}")
    return DATA


def test_every_file_at_hand_loads_under_its_name_its_group_and_its_path(data):
    longbench, ruler_qa = load("longbench", data), load("ruler_qa", data)
    assert len(expand_names(["longbench", "ruler_qa"], str(data))) == 9
    files = sorted(data.glob("*/*.parquet"))
    assert len(files) == 9
    for file in files:
        table = pyarrow.parquet.read_table(file)
        found = load(file)
        first = found.samples[0]
        assert (len(found.samples), found.skipped) == (table.num_rows, {})
        assert load(f"{first.benchmark}/{first.task}", data).samples == found.samples
        group = longbench if first.benchmark == "longbench" else ruler_qa
        assert [sample for sample in group.samples if sample.task == first.task] == found.samples
        answers = table["answers" if "answers" in table.column_names else "answer"].to_pylist()
        assert [list(sample.answers) for sample in found.samples] == answers
        assert [sample.prompt for sample in found.samples] == table["prompt"].to_pylist()
        if first.benchmark == "longbench":
            assert {sample.max_new_tokens for sample in found.samples} == {LONGBENCH_MAX_NEW_TOKENS[first.task]}
            assert {sample.length for sample in found.samples} == {None}
        else:
            assert {(sample.max_new_tokens, sample.length) for sample in found.samples} == {(32, 4096)}
        for sample in found.samples[:20]:
            assert next(iter(score(sample.benchmark, sample.task, sample.answers[0], sample.answers).values())) > 0.5


@pytest.mark.parametrize("task", [*LONGBENCH_METRICS, "ruler_squadqa", "ruler_triviaqa", "ruler_musique", "qa_1"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_every_task_loads_with_or_without_the_optional_columns(tmp_path, task, suffix):
    benchmark = "longbench" if task in LONGBENCH_METRICS else "ruler_qa"
    bare = {"prompt": "p", "answer": "a"}
    write(tmp_path / f"{task}_16384{suffix}", [bare])
    sample = load(f"{benchmark}/{task}", tmp_path).samples[0]
    assert (sample.benchmark, sample.task, sample.answers, sample.length) == (benchmark, task, ("a",), None)
    assert sample.max_new_tokens == LONGBENCH_MAX_NEW_TOKENS.get(task, 32)
    assert load(benchmark, tmp_path).samples == [sample]

    path = write(tmp_path / "own" / f"mine{suffix}", [bare | {"task": task, "max_gen_tokens": 9, "max_seq_length": 512}])
    sample = load(path).samples[0]
    assert (sample.benchmark, sample.task, sample.max_new_tokens, sample.length) == (benchmark, task, 9, 512)


@pytest.mark.parametrize(("task", "tokens"), [("ruler_niah_single_1", 128), ("ruler_vt", 30), ("ruler_cwe", 120), ("ruler_fwe", 50)])
def test_synthetic_tasks_in_files_are_scored_as_generated_ones(tmp_path, task, tokens):
    write(tmp_path / "ruler" / f"{task}_lact_4096_200_test.parquet", [{"prompt": "p", "answer": ["x", "y"], "task": task}])
    sample = load(f"ruler/{task}", tmp_path).samples[0]
    assert (sample.benchmark, sample.max_new_tokens) == ("ruler", tokens)
    assert score(sample.benchmark, sample.task, "no\nX", sample.answers)["reference_fraction"] == 0.5


def test_every_longbench_task_has_a_metric_and_a_number_of_tokens():
    assert set(LONGBENCH_MAX_NEW_TOKENS) == set(LONGBENCH_METRICS)


def test_unusable_rows_are_counted_and_the_others_keep_their_number(tmp_path):
    rows = [
        ROW | {"prompt": ""},
        ROW | {"prompt": " \n"},
        ROW,
        ROW | {"prompt": None},
        ROW | {"answers": []},
        ROW | {"answers": None},
        ROW | {"answers": ["", " "]},
        ROW | {"answers": ["", "x|y", "two\nlines"]},
    ]
    for suffix in (".parquet", ".jsonl"):
        found = load(write(tmp_path / f"rows{suffix}", rows))
        usable = [(sample.index, sample.answers) for sample in found.samples]
        assert usable == [(2, ("Ada", "Ada L.")), (7, ("x|y", "two\nlines"))]
        assert found.skipped == {"empty prompt": 2, "null prompt": 1, "no answers": 3}
    mixed = [ROW, ROW | {"answers": 3}, ROW | {"prompt": 3}, ROW | {"answers": [3]}, {"prompt": "p", "task": "hotpotqa"}]
    found = load(write(tmp_path / "mixed.jsonl", [*mixed, ROW | {"prompt": "\ud800"}]))
    assert len(found.samples) == 1
    assert found.skipped == {"not text (int) answer": 2, "not text (int) prompt": 1, "no answers": 1, "not UTF-8 prompt": 1}


def test_the_first_rows_are_taken_and_the_rest_is_not_read(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"prompt": ""}) + "\n" + json.dumps(ROW) + "\n{broken\n")
    found = load(path, num_samples=2)
    assert ([sample.index for sample in found.samples], found.skipped) == ([0, 2], {"empty prompt": 1})


def test_parquet_of_several_tasks_and_batches(tmp_path):
    rows = [ROW | {"task": ("hotpotqa", "qasper", "ruler_squadqa")[i % 3], "prompt": f"p{i}"} for i in range(200)]
    found = load(write(tmp_path / "all.parquet", rows))
    assert [(sample.index, sample.prompt) for sample in found.samples] == [(i, f"p{i}") for i in range(200)]
    assert Counter((sample.benchmark, sample.task) for sample in found.samples) == {
        ("longbench", "hotpotqa"): 67,
        ("longbench", "qasper"): 67,
        ("ruler_qa", "ruler_squadqa"): 66,
    }


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path / "hotpotqa.parquet", [{"prompt": "p", "answer": "a", "max_gen_tokens": 5.0, "gold": ["not this"]}])
    sample = load(path).samples[0]
    assert (sample.prompt, sample.answers, sample.max_new_tokens) == ("p", ("a",), 5)
    other = write(tmp_path / "qasper.parquet", [{"ask": "p", "gold": "a"}])
    with pytest.raises(UserError, match=r"no column 'prompt' or .*'context'; columns found: ask, gold"):
        load(other)
    last = write(tmp_path / "multifieldqa_en.parquet", [{"prompt": "p", "gold": "a"}])
    with pytest.raises(UserError, match=r"no column 'answers' or 'answer'; columns found: prompt, gold"):
        load(last)


def test_every_kind_of_table_is_read(tmp_path):
    """Marks, compression, suffixes in capitals, JSON arrays and Arrow files, as in training data."""
    rows = [{"prompt": f"p{i}", "answers": [str(i)]} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "hotpotqa_a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "qasper.JSONL").write_bytes(lines)
    (tmp_path / "lcc.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "musique.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    write_arrow(tmp_path / "trec.arrow", rows)
    for name in ("hotpotqa", "qasper", "lcc", "musique", "trec"):
        found = load(f"longbench/{name}", data_folder=str(tmp_path))
        assert [(sample.index, sample.prompt, sample.answers, sample.task) for sample in found.samples] == [
            (i, f"p{i}", (str(i),), name) for i in range(3)
        ]
    assert expand_names(["longbench"], str(tmp_path)) == [f"longbench/{name}" for name in ("hotpotqa", "lcc", "musique", "qasper", "trec")]


WRITERS = {
    "hotpotqa.jsonl": lambda path, rows: write(path, rows),
    "hotpotqa.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "hotpotqa.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())),
    "hotpotqa.parquet": lambda path, rows: write(path, rows),
    "hotpotqa.arrow": lambda path, rows: write_arrow(path, rows),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "pointer"])
def test_files_without_their_end_are_named(tmp_path, name, damage):
    path = tmp_path / name
    WRITERS[name](path, [ROW | {"prompt": f"p{i}"} for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "pointer": LFS_POINTER + b"v1"}[damage])
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer" if damage == "pointer" else name):
        load(path)


def test_empty_lines_are_counted(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text('\n{"prompt": "p", "answers": ["a"]}\n  \n')
    found = load(path)
    assert len(found.samples) == 1 and found.skipped == {"empty line": 2}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "p", "answers": ["a"]}],
            "no column 'prompt' or 'input' .* or 'context'; keys in line 1 found: text, answers",
        ),
        ([ROW, {"answers": ["a"]}], "no column 'prompt' or 'input' or .*; keys in line 2 found: answers"),
        ([{"prompt": "p", "reply": "a"}], "no column 'answers' or 'answer'; keys found: prompt, reply"),
        ([{"prompt": "p", "answers": ["a"], "benchmark": "longbench"}], "line 1: the task of longbench is unknown; give the file a column"),
        ([ROW, ROW | {"task": "hotpotqs", "benchmark": "longbench"}], "line 2: task 'hotpotqs' .* did you mean 'hotpotqa'"),
        ([ROW | {"benchmark": "longbnch"}], "line 1: benchmark 'longbnch' has no metric; did you mean 'longbench'"),
        ([ROW | {"benchmark": "perplexity"}], "line 1: benchmark 'perplexity' has no prompts with answers"),
        ([ROW | {"task": 3}], "line 1: task must be a string, found 3"),
        ([ROW | {"max_gen_tokens": 0}], "line 1: max_new_tokens is 0; allowed: a whole number from 1"),
        ([ROW | {"max_gen_tokens": "many"}], "max_new_tokens is 'many'"),
        ([ROW | {"max_gen_tokens": 1.5}], "max_new_tokens is 1.5"),
        ([ROW | {"max_gen_tokens": float("nan")}], "max_new_tokens is nan"),
        ([ROW | {"prompt": ""}, ROW | {"answers": []}], r"no usable row: empty prompt \(1\), no answers \(1\)"),
        ([], "is empty"),
        ([[1]], r"line 1: not an object, but \[1\]"),
    ],
)
def test_unusable_files_are_named_with_what_is_wrong(tmp_path, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_files_that_do_not_hold_what_their_names_say_are_refused(tmp_path):
    broken = tmp_path / "hotpotqa.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"hotpotqa.parquet cannot be read as parquet"):
        load(broken)
    broken = tmp_path / "hotpotqa.jsonl"
    broken.write_bytes(b'{"prompt": ')
    with pytest.raises(UserError, match=r"hotpotqa.jsonl, line 1: not JSON"):
        load(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"hotpotqa.jsonl, line 1: not UTF-8"):
        load(broken)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nowhere.parquet")
    empty = tmp_path / "trec.parquet"
    no_text = pyarrow.array([], "string")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": no_text, "answers": no_text}), empty)
    with pytest.raises(UserError, match="trec.parquet has no usable row"):
        load(empty)


def test_missing_and_ambiguous_files_are_named_with_the_files_found(tmp_path):
    with pytest.raises(UserError, match="data_folder is empty; tasks of longbench need the folder"):
        load("longbench/qasper")
    with pytest.raises(UserError, match="no such folder"):
        load("longbench", tmp_path / "nowhere")
    write(tmp_path / "longbench" / "hotpotqa_16384.parquet", [ROW])
    with pytest.raises(UserError, match=r"'longbench/qasper': no file qasper or qasper_.* files there: hotpotqa_16384.parquet"):
        load("longbench/qasper", tmp_path)
    with pytest.raises(UserError, match=r"'ruler_qa': no file of ruler_qa in .*files there: none"):
        load("ruler_qa", tmp_path)
    write(tmp_path / "hotpotqa.jsonl", [ROW])
    with pytest.raises(UserError, match=r"several files are named for it: .*hotpotqa_16384.parquet, .*hotpotqa.jsonl; give"):
        load("longbench/hotpotqa", tmp_path)
    write(tmp_path / "longbench" / "qasper.parquet", [ROW])
    with pytest.raises(UserError, match="row 0: task is 'hotpotqa', but 'qasper' was asked for"):
        load("longbench/qasper", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("longbnch", "did you mean 'longbench'"),
        ("hotpotqa", "did you mean 'longbench/hotpotqa'"),
        ("ruler/niah_singel_1", "did you mean 'niah_single_1'?; known: niah_single_1, niah_single_2"),
        ("longbench/hotpotq", "did you mean 'hotpotqa'"),
        ("ruler_qa/squadqa", "did you mean 'ruler_squadqa'"),
        ("niah/single", "allowed: niah, ruler, longbench, ruler_qa, BENCHMARK/TASK"),
        ("", "is unknown; allowed"),
        ("data.csv", "is unknown; allowed"),
    ],
)
def test_unknown_names_end_with_the_nearest_and_the_allowed(name, message):
    with pytest.raises(UserError) as error:
        load(name)
    assert message in str(error.value)


def test_groups_stand_for_their_tasks_once():
    names = expand_names(["ruler/vt", "niah", "ruler", "ruler/vt"])
    assert len(names) == 11 and names[0] == "ruler/vt"
    assert names[1:3] == ["ruler/niah_single_1", "ruler/niah_single_2"]
    calls = []
    found = load("niah", lengths=[1024, 1200, 1024], num_samples=2, progress=lambda *call: calls.append(call))
    assert Counter((sample.task, sample.length) for sample in found.samples) == {
        (name.removeprefix("ruler/"), length): 2 for name in expand_names(["niah"]) for length in (1024, 1200)
    }
    assert calls[:4] == [("ruler/niah_single_1", done, 4) for done in (1, 2, 3, 4)]
    with pytest.raises(UserError, match="num_samples is 0"):
        load("ruler/vt", num_samples=0)
    with pytest.raises(UserError, match="lengths is empty"):
        load("ruler/vt", lengths=[])


@pytest.mark.parametrize(
    ("stem", "task"),
    [
        ("hotpotqa_16384", "hotpotqa"),
        ("repobench-p", "repobench-p"),
        ("multifieldqa_en_16384", "multifieldqa_en"),
        ("ruler_squadqa_delta_net_4096_200_test", "ruler_squadqa"),
        ("ruler_niah_multikey_2_lact_4096", "ruler_niah_multikey_2"),
        ("ruler_niah_multiquery_4096", "ruler_niah_multiquery"),
        ("qa_1_8192", "qa_1"),
        ("hotpotqaish", None),
        ("notes", None),
    ],
)
def test_a_files_name_begins_with_its_task(stem, task):
    assert task_of(Path(f"{stem}.parquet")) == task
