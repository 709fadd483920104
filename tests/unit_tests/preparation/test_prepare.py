"""`prepare`: what it keeps, cuts, drops and counts; the same bytes whatever the units; continuing unfinished work, or refusing to."""

import errno
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from refine_titan.errors import UserError
from refine_titan.files.whole_files import new_file
from refine_titan.preparation import run, units
from refine_titan.preparation.run import partial_folder
from refine_titan.preparation.settings import RECIPES
from tests.unit_tests.preparation.made_up import call, content, records, texts, write_corpus, write_jsonl


def as_text(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8")


def test_every_format_gives_its_rows_in_order(tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder may be there
    outcome = call(write_corpus(tmp_path / "in"), tmp_path / "out")
    found = records(tmp_path / "out")
    rows = texts(60)
    text_file = "one text\nin a file of its own\n" * 9  # every end of a line is \n, as the trainer reads it
    expected = rows[:25] + rows[3:5] + rows[20:45] + rows[40:] + texts(10, seed=1) + [text_file]
    assert [as_text(row["tokens"]) for row in found] == expected
    assert all(row["num_tokens"] == len(row["tokens"]) for row in found)
    sources = [row["source"] for row in found]
    assert sources[:2] == ["a.jsonl:0", "a.jsonl:1"] and sources[27] == "b.parquet:0" and sources[51] == "b.parquet:24"
    assert sources[52] == "c.jsonl.gz:0" and sources[-2:] == ["d.jsonl.zst:9", "sub/e.txt:0"]
    counts = outcome.manifest["counts"]
    assert counts["rows"] == counts["kept_rows"] == counts["records"] == len(expected)
    assert counts["tokens"] == counts["tokens_read"] == sum(len(text.encode()) for text in expected)


@pytest.mark.parametrize("unit_bytes", [1, 137, 4000, 1 << 24])
def test_bytes_do_not_depend_on_the_units(tmp_path, unit_bytes):
    source = write_corpus(tmp_path / "in")
    settings = {"deduplicate": "exact", "min_tokens": 30, "max_tokens": 100, "long_documents": "split", "shard_tokens": 1500}
    call(source, tmp_path / "expected", **settings)
    outcome = call(source, tmp_path / "out", unit_bytes=unit_bytes, **settings)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert len(outcome.manifest["shards"]) > 5
    assert outcome.tokenization.units > 50 if unit_bytes == 1 else outcome.tokenization.units >= 1


def test_exact_duplicates_keep_the_first_across_files(tmp_path):
    source = write_corpus(tmp_path / "in")
    outcome = call(source, tmp_path / "out", deduplicate="exact", max_tokens=60, long_documents="split")
    seen, expected = set(), []
    for row in records_by_document(tmp_path / "all", source):
        if row["text"] not in seen:
            expected.append(row["source"])
            seen.add(row["text"])
    kept = [row["source"] for row in records(tmp_path / "out")]
    assert [source for source in kept if "+" not in source] == expected
    assert len(kept) > len(expected)  # later pieces are kept with their document
    assert outcome.manifest["counts"]["skipped"] == {"duplicate": 2 + 5 + 5}


def records_by_document(folder, source):
    call(source, folder)
    return [{"source": row["source"], "text": as_text(row["tokens"])} for row in records(folder)]


def test_filters_and_cuts(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * n for n in (99, 100, 150, 250, 260)])
    lengths = {}
    for name in ("truncate", "split"):
        outcome = call(source, tmp_path / name, min_tokens=60, max_tokens=100, long_documents=name)
        lengths[name] = [row["num_tokens"] for row in records(tmp_path / name)]
    assert lengths["truncate"] == [99, 100, 100, 100, 100]
    assert lengths["split"] == [99, 100, 100, 100, 100, 100, 100, 60]  # a rest under the minimum is dropped
    assert [row["source"] for row in records(tmp_path / "split")][-3:] == ["a.jsonl:4", "a.jsonl:4+100", "a.jsonl:4+200"]
    outcome = call(source, tmp_path / "keep", min_tokens=150, min_bytes=100)
    assert [row["num_tokens"] for row in records(tmp_path / "keep")] == [150, 250, 260]
    assert outcome.manifest["counts"]["skipped"] == {"too short": 1, "under 100 bytes": 1}
    assert outcome.manifest["counts"]["tokens_read"] == 100 + 150 + 250 + 260  # the first was not tokenized


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path):
    good = json.dumps({"text": "y" * 100})
    rows = [
        good,
        json.dumps({"text": None}),
        "",
        "{broken",
        json.dumps({"text": ""}),
        json.dumps({"other": 1}),
        json.dumps({"text": 5}),
        json.dumps({"text": "\ud800"}),
        json.dumps([1]),
        good,
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xff\xfe"}\n')
    (tmp_path / "in" / "latin.txt").write_bytes(b"\xe9")
    invalid = pyarrow.array([b"\xff\xfe"], type=pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": pyarrow.chunked_array([pyarrow.array(["z", None], pyarrow.string()), invalid])})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "b.parquet")
    counts = call(tmp_path / "in", tmp_path / "out").manifest["counts"]
    assert counts["skipped"] == {
        "empty": 2,
        "no key 'text'": 2,
        "not JSON": 1,
        "not UTF-8": 4,
        "not text (int)": 1,
        "null": 2,
    }
    assert counts["rows"] == 15 and counts["kept_rows"] == 3


def test_shards_hold_at_most_their_tokens(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * n for n in (40, 40, 40, 150, 10, 90, 1)])
    shards = call(source, tmp_path / "out", shard_tokens=100).manifest["shards"]
    assert [(shard["rows"], shard["tokens"]) for shard in shards] == [(2, 80), (1, 40), (1, 150), (2, 100), (1, 1)]


def test_a_seed_shuffles_all_documents_and_loses_none(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i:04}" * 5 for i in range(300)])
    orders = {}
    for name, seed, unit_bytes in (("1", 1, 500), ("1 again", 1, 7000), ("2", 2, 500)):
        call(source, tmp_path / name, seed=seed, shard_tokens=1000, unit_bytes=unit_bytes)
        orders[name] = [int(row["source"].split(":")[1]) for row in records(tmp_path / name)]
    assert orders["1"] == orders["1 again"] != orders["2"]
    assert sorted(orders["1"]) == sorted(orders["2"]) == list(range(300))
    displacement = sum(abs(row - position) for position, row in enumerate(orders["1"])) / 300
    assert 80 < displacement < 120  # 100 for a uniform shuffle of 300


def test_large_vocabularies_get_wider_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    for size, kind in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        folder = tmp_path / kind
        folder.mkdir()
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.enable_truncation(2)  # a setting stored in the tokenizer's file, which must not cut documents
        tokenizer.save(str(folder / "tokenizer.json"))
        source = write_jsonl(tmp_path / "a.jsonl", [f"w1 w{size - 1} w3"])
        call(source, tmp_path / f"out {kind}", tokenizer=str(folder))
        table = pyarrow.parquet.read_table(tmp_path / f"out {kind}" / "shard-00000.parquet")
        assert table.schema.field("tokens").type.value_type == kind
        assert table.column("tokens").to_pylist() == [[1, size - 1, 3]]


class Killed(BaseException):
    """Ends a call like a signal: of our handlers only the `finally` blocks run."""


def killed_after(monkeypatch, count: int) -> None:
    """Makes the next call end after `count` units."""
    original, calls = run.process_unit, []

    def process(*arguments):
        if len(calls) == count:
            raise Killed
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(run, "process_unit", process)


def test_interrupted_call_goes_on_with_the_units_that_are_left(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in")
    call(source, tmp_path / "expected", deduplicate="exact")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 5)
        call(source, tmp_path / "out", deduplicate="exact")
    partial = partial_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(partial.rglob("*.arrow"))) == 5
    (partial / "work" / "000005.arrow.tmp").write_bytes(b"half of a un")
    (partial / "shard-00000.parquet.tmp").write_bytes(b"half of a sh")
    outcome = call(source, tmp_path / "out", deduplicate="exact")
    assert outcome.tokenization.resumed_units == 5 < outcome.tokenization.units
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]


def test_call_killed_between_shards_writes_only_the_others(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in")
    call(source, tmp_path / "expected", shard_tokens=2000)
    written, original = [], run.write_shard

    def write(plan, *arguments):
        if len(written) == 2:
            raise Killed
        written.append(plan.number)
        return original(plan, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "write_shard", write)
        call(source, tmp_path / "out", shard_tokens=2000)
    first = partial_folder(tmp_path / "out") / "shard-00000.parquet"
    inode = first.stat().st_ino
    outcome = call(source, tmp_path / "out", shard_tokens=2000)
    assert outcome.tokenization.resumed_units == outcome.tokenization.units
    assert (tmp_path / "out" / first.name).stat().st_ino == inode
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@pytest.mark.parametrize(
    "change, message",
    [
        ("min_tokens", "--min-tokens was 1 and is 2"),
        ("input", "input a.jsonl has changed"),
        ("new input", "input z.txt is new"),
        ("input gone", "input sub/e.txt is gone"),
        ("tokenizer", "--tokenizer was bytes .* and is words"),
        ("unit_bytes", "--unit-bytes was 500 and is 600"),
    ],
)
def test_other_inputs_or_settings_are_refused_by_name(tmp_path, monkeypatch, words, change, message):
    source = write_corpus(tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 5)
        call(source, tmp_path / "out")
    settings = {"min_tokens": {"min_tokens": 2}, "tokenizer": {"tokenizer": str(words)}, "unit_bytes": {"unit_bytes": 600}}
    if change == "input":
        path, stat = source / "a.jsonl", (source / "a.jsonl").stat()
        path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))  # same size and time: only the hash differs
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "new input":
        (source / "z.txt").write_text("more")
    elif change == "input gone":
        (source / "sub" / "e.txt").unlink()
    with pytest.raises(UserError, match=message) as error:
        call(source, tmp_path / "out", **settings.get(change, {}))
    assert str(partial_folder(tmp_path / "out")) in str(error.value)


@pytest.fixture
def words(tmp_path):
    """A Hugging Face tokenizer's folder."""
    from tokenizers import Tokenizer, models

    (tmp_path / "words").mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "words" / "tokenizer.json"))
    return tmp_path / "words"


def test_complete_output_is_left_alone_or_refused(tmp_path):
    source = write_corpus(tmp_path / "in")
    first = call(source, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "work").mkdir()  # left by a call that was killed at its very end
    again = call(source, tmp_path / "out", unit_bytes=900)
    assert again.tokenization is None and again.manifest | {"manifest_sha256": ""} == first.manifest | {"manifest_sha256": ""}
    assert content(tmp_path / "out") == before and not (tmp_path / "out" / "work").exists()
    with pytest.raises(UserError, match="--deduplicate was 'none' and is 'exact'. Give another path"):
        call(source, tmp_path / "out", deduplicate="exact")
    (source / "sub" / "e.txt").write_text("other")
    with pytest.raises(UserError, match="input sub/e.txt has changed"):
        call(source, tmp_path / "out")


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in")
    original = run.plan_units

    def touched(*arguments):
        with (source / "a.jsonl").open("a") as file:
            file.write("\n")
        return original(*arguments)

    monkeypatch.setattr(run, "plan_units", touched)
    with pytest.raises(UserError, match="a.jsonl has changed while it was read"):
        call(source, tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


def test_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in")
    call(source, tmp_path / "expected")

    def full(path):
        if path.name == "000007.arrow":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return new_file(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(units, "new_file", full)
        call(source, tmp_path / "out")
    assert call(source, tmp_path / "out").tokenization.resumed_units == 7
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    out = tmp_path / "out"

    def refused(message, source=folder, output=out, **settings):
        with pytest.raises(UserError, match=message):
            call(source, output, **settings)
        assert sorted(path.name for path in tmp_path.iterdir()) == left

    left = ["in"]
    refused("--input .*nowhere: no such file or folder", source=tmp_path / "nowhere")
    refused("holds no file ending in .txt")
    (folder / "picture.png").write_bytes(b"x")
    refused("ends in '.png'; allowed: .txt", source=folder / "picture.png")
    write_jsonl(folder / "a.jsonl", ["text of a row"], key="body")
    refused(r"a.jsonl has no column 'text'; it has the columns: body")
    refused("no path matches --files '\\*train\\*'; there are 1 files, such as a.jsonl", text_column="body", files="*train*")
    refused("no document is left of 1 rows: 1 too short", text_column="body", min_tokens=100)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), folder / "b.parquet")
    refused("b.parquet has no column 'text'; it has the columns: body, title", source=folder / "b.parquet")
    (folder / "c.parquet").write_bytes(b"PAR1 this is not parquet")
    refused("c.parquet cannot be read", source=folder / "c.parquet")
    (folder / "d.jsonl.gz").write_bytes(b"not gzip")
    refused("d.jsonl.gz cannot be read", source=folder / "d.jsonl.gz")
    (folder / "empty.jsonl").write_bytes(b"")
    refused("no document is left of 0 rows: the inputs are empty", source=folder / "empty.jsonl")
    refused("--tokenizer is .* which holds neither tokenizer.json nor vocab.json", tokenizer=str(folder))
    refused("--output .* lies inside --input", output=folder / "out", text_column="body")
    left = ["in", "out"]
    out.mkdir()
    (out / "mine").write_text("x")
    refused("is neither an empty folder nor prepared data", text_column="body")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 5}, "choose --long-documents truncate or split"),
        ({"long_documents": "split"}, "needs --max-tokens"),
        ({"long_documents": "split", "max_tokens": 5, "min_tokens": 6}, "allowed: at most --max-tokens, 5"),
        ({"min_tokens": 0}, "--min-tokens is 0; allowed: 1 to"),
        ({"shard_tokens": 2**40}, "--shard-tokens is 1099511627776; allowed: 1 to"),
        ({"suffixes": ("md",)}, "with their dot"),
        ({"kind": "questions", "long_documents": "split"}, "questions are never cut"),
        ({"kind": "questions", "max_tokens": 32}, "it has to hold --answer-tokens"),
        ({"kind": "questions", "min_bytes": 3}, "--min-bytes is 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path, tmp_path / "out", **settings)


def test_slimpajama_recipe(tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    lengths = (16383, 16384, 40000, 20000, 16384)
    rows = ["ab"[i == 1] * n for i, n in enumerate(lengths)]
    meta = [{"redpajama_set_name": "RedPajamaBook"}] * len(rows)
    for split in ("train", "test"):
        table = pyarrow.table({"text": rows, "meta": meta, "__index_level_0__": range(len(rows))})
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")
    (tmp_path / "hub" / "README.md").write_text("a card" * 9999)
    outcome = call(tmp_path / "hub", tmp_path / "out", recipe="slimpajama-6b")
    found = records(tmp_path / "out")
    assert [row["num_tokens"] for row in found] == [16384] * 4
    assert [row["source"].split(":")[1] for row in found] == ["1", "2", "3", "4"]
    assert outcome.manifest["counts"]["skipped"] == {"under 16384 bytes": 1}
    longer = call(tmp_path / "hub", tmp_path / "longer", recipe="slimpajama-6b", min_tokens=30000)
    assert longer.manifest["counts"]["kept_rows"] == 1


def test_questions_keep_prompt_and_answers(tmp_path):
    rows = [
        {"prompt": "p" * 968, "answer": ["one", "two|three\n"]},
        {"prompt": "p" * 969, "answer": ["too long"]},
        {"prompt": "q", "answer": "a single text"},
        {"prompt": "q", "answer": []},
        {"prompt": "q", "answer": None},
        {"prompt": "q", "answer": ["", None]},
        {"prompt": "q", "answer": [3]},
        {"prompt": "", "answer": ["x"]},
        {"prompt": None, "answer": ["x"]},
        {"answer": ["x"]},
        {"prompt": "q", "answer": ["a single text"]},
    ]
    path = tmp_path / "ruler_squadqa_mine_1000_11_train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = call(path, tmp_path / "out", recipe="ruler-squadqa", max_tokens=1000, deduplicate="exact")
    assert records(tmp_path / "out") == [
        {"prompt": "p" * 968, "answers": ["one", "two|three\n"], "prompt_tokens": 968, "answer_tokens": 3, "source": f"{path.name}:0"},
        {"prompt": "q", "answers": ["a single text"], "prompt_tokens": 1, "answer_tokens": 13, "source": f"{path.name}:2"},
    ]
    assert outcome.manifest["counts"]["skipped"] == {
        "duplicate": 1,
        "empty prompt": 1,
        "no answers": 3,
        "no key 'prompt'": 1,
        "not text (int) answer": 1,
        "null prompt": 1,
        "prompt of over 968 tokens": 1,
    }


@pytest.mark.parametrize("name", ["squadqa", "hotpotqa"])
def test_published_ruler_questions(tmp_path, name, shared_data):
    if not list((shared_data / "ruler").glob(f"*{name}*.parquet")):
        pytest.skip(f"no file of {name} in {shared_data}")
    with pytest.raises(UserError, match=f"--files '\\*{name}\\*train\\*'"):
        call(shared_data / "ruler", tmp_path / "out", recipe=f"ruler-{name}")  # only test questions are there
    outcome = call(shared_data / "ruler", tmp_path / "out", recipe=f"ruler-{name}", files=f"*{name}*", max_tokens=16384 + 32)
    [path] = (shared_data / "ruler").glob(f"*{name}*.parquet")
    originals, found = pyarrow.parquet.read_table(path).to_pylist(), records(tmp_path / "out")
    kept = [row for row in originals if len(row["prompt"].encode()) <= 16384]
    assert [(row["prompt"], row["answers"]) for row in found] == [(row["prompt"], row["answer"]) for row in kept]
    assert [row["prompt_tokens"] for row in found] == [len(row["prompt"].encode()) for row in kept]
    assert len(found) + outcome.manifest["counts"]["skipped"].get("prompt: over 16384 tokens", 0) == len(originals) == 200


def test_every_recipe_is_described():
    from refine_titan.preparation.settings import describe_recipes, resolve_settings

    for name in RECIPES:
        assert name in describe_recipes() and resolve_settings(name, {}).kind in ("documents", "questions")
    with pytest.raises(UserError, match="--recipe is 'c4'; allowed: slimpajama-6b, ruler-squadqa, ruler-hotpotqa"):
        resolve_settings("c4", {})
