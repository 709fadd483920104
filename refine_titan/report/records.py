"""Reads and checks the files of an evaluation run: `run.json`, and `samples.jsonl` with one line for each finished sample."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines, complete_lines
from refine_titan.files.limits import read_small_file

FORMAT = 1
RUN_FILE, SAMPLES_FILE = "run.json", "samples.jsonl"
RUN_FIELDS = (
    "format",
    "name",
    "checkpoint",
    "weights_sha256",
    "tokenizer_sha256",
    "model",
    "engine",
    "protocol",
    "phase",
    "seed",
    "tasks",
    "haystack",
    "versions",
    "config",
)
# The digest of samples leaves times out, so that a resumed run has the digest of one that was not interrupted.
TIMES = ("seconds", "adaptation_seconds")

Record = dict[str, Any]
# A task at one length: (benchmark, task, length).
Cell = tuple[str, str, int | None]


def read_run(folder: Path) -> Record:
    """Reads the run's description.

    Raises:
        UserError: if `run.json` is missing or has another format.
    """
    path = folder / RUN_FILE
    run = read_object(path)
    check_format(path, run, RUN_FILE, RUN_FIELDS)
    return run


def read_object(path: Path) -> Record:
    """Reads a file that holds one JSON object.

    Raises:
        UserError: if it is missing or holds something else.
    """
    try:
        value = json.loads(read_small_file(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; it is written by an evaluation run") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def check_format(path: Path, value: Record, kind: str, fields: tuple[str, ...]) -> None:
    """Raises UserError, which names the fields found, unless `value` is a `kind` of this format."""
    missing = [name for name in fields if name not in value]
    if missing:
        found = ", ".join(map(repr, list(value)[:12])) + (" ..." if len(value) > 12 else "")
        raise UserError(f"{path} is no {kind} of refine_titan: it lacks {', '.join(missing)}; found: {found or 'no fields'}")
    if value["format"] != FORMAT:
        raise UserError(f"{path} has format {value['format']!r}; this version reads format {FORMAT}")
    for name in ("model", "protocol", "phase", "versions", "config"):
        if name in fields and not isinstance(value[name], dict):
            raise UserError(f"{path}: {name} is {value[name]!r:.80}, not an object")
    for name in ("name", "checkpoint"):
        if name in fields and not isinstance(value[name], str):
            raise UserError(f"{path}: {name} is {value[name]!r:.80}, not a string")
    if "seed" in fields and type(value["seed"]) is not int:
        raise UserError(f"{path}: seed is {value['seed']!r:.80}, not an integer")


def read_evaluation(folder: Path) -> tuple[Record, list[Record]]:
    """Reads the run's description and its finished samples; damaged lines become one of the run's notes.

    Raises:
        UserError: as `read_run` and `read_samples`.
    """
    run, damaged = read_run(folder), DamagedLines(folder / SAMPLES_FILE)
    samples = read_samples(folder, damaged)
    if damaged:
        run["notes"] = [*(run.get("notes") or []), str(damaged)]
    return run, samples


def read_samples(folder: Path, damaged: DamagedLines) -> list[Record]:
    """Reads the finished samples and sorts them by benchmark, task, length and index.

    A last line without a newline is left out: the run was killed while it wrote it. Damaged lines are left out, added to `damaged`
    and named in a warning.

    Raises:
        UserError: if the file is missing, a line holds something else than a finished sample, or a sample occurs twice.
    """
    path, records = folder / SAMPLES_FILE, {}
    for number, record in parsed_samples(path, damaged):
        key = (*cell_of(record), record["index"])
        if key in records:
            raise UserError(
                f"{path} holds sample {record['index']} of {cell_name(key[:3])} twice, in lines {records[key][0]} and {number}; remove one"
            )
        records[key] = (number, record)
    damaged.warn()
    return [record for _, record in sorted(records.values(), key=lambda entry: sort_key(entry[1]))]


def parsed_samples(path: Path, damaged: DamagedLines) -> Iterator[tuple[int, Record]]:
    """Yields the number and the sample of every whole line of `samples.jsonl`; lines that are not JSON are added to `damaged`.

    Raises:
        UserError: if the file cannot be read, or a line holds something else than a finished sample.
    """
    num_samples = 0
    try:
        path.stat()
        for line in complete_lines(path):
            try:
                record = json.loads(line.whole())
            except (ValueError, RecursionError) as error:
                damaged.add(line, f"not JSON: {error}")
            else:
                num_samples += 1
                yield line.number, check_sample(f"{path}, line {line.number}", record)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it is written by an evaluation run") from error
    if damaged and not num_samples:
        raise UserError(f"{path} holds no finished samples; line {damaged.numbers[0]}: {damaged.first_reason}")


def cell_of(record: Record) -> Cell:
    """Cell of a sample."""
    return record["benchmark"], record["task"], record["length"]


def cell_name(cell: Cell) -> str:
    """`ruler/vt at length 4096`, for messages."""
    benchmark, task, length = cell
    return f"{benchmark}/{task}" + (f" at length {length}" if length is not None else "")


def stratum_name(cell: Cell) -> str:
    """Name of a cell as a stratum, from which its random draws are derived."""
    return "/".join(str(part) for part in cell)


def sort_key(record: Record) -> tuple:
    """Key that sorts samples by benchmark, task, length and index."""
    return record["benchmark"], record["task"], record["length"] or 0, record["index"]


def flatten(value: Any, name: str) -> list[tuple[str, Any]]:
    """Lists (dotted name, value) of a setting, or of every setting in a nested object."""
    found, rest = [], [(name, value)]
    while rest:  # not by recursion: a file of strangers may nest deeper than Python calls
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{name}.{key}", inner) for key, inner in reversed(value.items())]
        else:
            found.append((name, value))
    return found


def samples_sha256(records: list[Record]) -> str:
    """SHA-256 of the samples without their times."""
    sha256 = hashlib.sha256()
    for record in records:
        kept = {name: value for name, value in record.items() if name not in TIMES}
        sha256.update(json.dumps(kept, sort_keys=True).encode() + b"\n")
    return sha256.hexdigest()


def check_sample(where: str, record: Any) -> Record:
    """Checks the value in a line of `samples.jsonl`, and returns it.

    Args:
        where: file and line number, with which an error's message begins.

    Raises:
        UserError: if it is not a finished sample.
    """
    needed = {"benchmark": str, "task": str, "index": int, "prompt_sha256": str}
    if not isinstance(record, dict):
        raise UserError(f"{where}, holds a JSON {type(record).__name__}, not an object")
    record.setdefault("length", None)
    is_perplexity = record.get("benchmark") == "perplexity"
    needed |= {"nll_by_position": list, "positions": list} if is_perplexity else {"score": (int, float), "metrics": dict}
    for name, kind in needed.items():
        if name not in record:
            raise UserError(f"{where}, is no finished sample: it lacks {name!r}; found: {', '.join(map(repr, record))}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise UserError(f"{where}: {name} is {record[name]!r:.80}; its type is wrong")
    if record["length"] is not None and type(record["length"]) is not int:
        raise UserError(f"{where}: length is {record['length']!r:.80}; allowed: an integer or null")
    if is_perplexity:
        _check_perplexity(where, record)
    else:
        _check_scores(where, record)
    return record


def _check_scores(where: str, record: Record) -> None:
    for name, value in {"score": record["score"], **record["metrics"]}.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise UserError(f"{where}: {name} is {value!r:.80}; allowed: numbers from 0 to 1")
    depth = record.get("depth")
    if depth is not None and (type(depth) not in (int, float) or not 0 <= depth <= 1):
        raise UserError(f"{where}: depth is {depth!r:.80}; allowed: 0 to 1, or null")


def _check_perplexity(where: str, record: Record) -> None:
    nll, positions = record["nll_by_position"], record["positions"]
    if not nll or len(nll) != len(positions):
        counts = f"{len(nll)} values in nll_by_position and {len(positions)} in positions"
        raise UserError(f"{where}: {counts}; allowed: as many, above 0")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*nll, *positions, record.get("nll", 0))):
        raise UserError(f"{where}: nll, nll_by_position or positions hold something that is not a finite number")
