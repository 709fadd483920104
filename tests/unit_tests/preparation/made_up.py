"""Small made-up inputs, and calls of `prepare` on them."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

from refine_titan.preparation.run import Outcome, prepare
from refine_titan.preparation.settings import resolve_settings


def texts(count: int, seed: int = 0, longest: int = 400) -> list[str]:
    """Texts of 1 to `longest` characters, some with several bytes each."""
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefgh é漢\n") for _ in range(rng.randrange(1, longest))) for _ in range(count)]


def write_jsonl(path: Path, rows: list, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_corpus(folder: Path) -> Path:
    """A folder with a file of every format. Some texts occur twice, in one file or in two."""
    folder.mkdir()
    rows = texts(60)
    write_jsonl(folder / "a.jsonl", rows[:25] + rows[3:5])
    pyarrow.parquet.write_table(pyarrow.table({"text": rows[20:45], "meta": range(25)}), folder / "b.parquet", row_group_size=4)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in rows[40:]).encode()))
    with pyarrow.output_stream(str(folder / "d.jsonl.zst"), compression="zstd") as file:
        file.write("".join(json.dumps({"text": t}) + "\n" for t in texts(10, seed=1)).encode())
    (folder / "sub").mkdir()
    (folder / "sub" / "e.txt").write_text("one text\r\nin a file of its own\n" * 9)
    return folder


def call(source: Path | list[Path], output: Path, recipe: str | None = None, **settings) -> Outcome:
    """Calls `prepare` in this process, in small units, with the byte tokenizer unless `tokenizer` names a folder."""
    keywords = {"workers": settings.pop("workers", 1), "unit_bytes": settings.pop("unit_bytes", 500)}
    inputs = source if isinstance(source, list) else [source]
    return prepare(inputs, settings.pop("tokenizer", ""), output, resolve_settings(recipe, settings), **keywords)


def records(folder: Path) -> list[dict]:
    """All rows of prepared data."""
    return [row for path in sorted(folder.glob("shard-*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by the file's path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
