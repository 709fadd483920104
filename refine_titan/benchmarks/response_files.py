"""Scores a file of responses, which any model and program may have written."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from refine_titan.benchmarks.metrics import QUESTIONS, score
from refine_titan.benchmarks.question_metrics import DEFAULT_METRIC, score_question
from refine_titan.data.question_rows import usable_answers
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_ROW_MIB, read_lines

FIELDS = {"benchmark": str, "task": str, "response": str, "answers": list}


def score_file(path: Path) -> Iterator[dict]:
    """Yields every line of a jsonl file of {benchmark, task, response, answers}, with its main metric added as `score`.

    A line of the benchmark `questions` may name its `metric`.

    Raises:
        UserError: if the file cannot be read, or a line is malformed or has no metric. The message names file and line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            for number, (line, nbytes, _) in enumerate(read_lines(file, MAX_ROW_MIB.nbytes), start=1):
                try:
                    if line is None:
                        raise UserError(f"{nbytes:,} bytes; allowed: {MAX_ROW_MIB.words(' MiB')}")
                    record = _record(line)
                    answers = usable_answers(record["answers"])
                    if isinstance(answers, str):
                        raise UserError(f"{record['benchmark']}/{record['task']}: {answers}; found {record['answers']!r:.80}")
                    metrics = _metrics(record, answers)
                except UserError as error:
                    raise UserError(f"{path}, line {number}: {error}") from error
                yield record | {"score": next(iter(metrics.values()))}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if number == 0:
        raise UserError(f"{path} is empty; needed are lines of {{{', '.join(FIELDS)}}}")


def _metrics(record: dict, answers: tuple[str, ...]) -> dict[str, float]:
    if record["benchmark"] == QUESTIONS:
        return score_question(record.get("metric", DEFAULT_METRIC), record["response"], answers)
    return score(record["benchmark"], record["task"], record["response"], answers)


def _record(line: bytes) -> dict:
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})" if line.strip() else "the line is empty") from error
    if not isinstance(record, dict):
        raise UserError(f"not an object with {', '.join(FIELDS)}, but {record!r:.80}")
    missing = [key for key in FIELDS if key not in record]
    if missing:
        raise UserError(f"no {', '.join(missing)}; keys found: {', '.join(record) or 'none'}")
    for key, kind in FIELDS.items():
        if not isinstance(record[key], kind):
            allowed = "a string" if kind is str else "a list of strings"
            raise UserError(f"{key} must be {allowed}, found {record[key]!r:.80}")
    return record
