"""Reads tasks from files: tables with a prompt and its answers in each row."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from refine_titan.benchmarks.longbench_prompts import asks_a_question, longbench_prompt
from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, QUESTIONS, RULER_FILE_NAMES, RULER_QA_NAMES, check_task
from refine_titan.benchmarks.question_metrics import DEFAULT_METRIC
from refine_titan.benchmarks.samples import Sample
from refine_titan.data.chat import ChatTemplate
from refine_titan.data.data_files import compression_of, format_of, lines_of, read_whole, reading
from refine_titan.data.file_source import arrow_batches, json_array
from refine_titan.data.parquet_footer import CheckedParquetFile
from refine_titan.data.parquet_pages import group_batches
from refine_titan.data.question_rows import ANSWER_COLUMNS, question_row, usable_answers
from refine_titan.data.rows import Row, cell_value, too_long
from refine_titan.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".json", ".arrow")
# Rows of a parquet file in memory at once. Prompts may have a million characters.
BATCH_ROWS = 64

# Answer tokens if a row does not say: the paper's, and LongBench's own for the tasks that the paper leaves out.
LONGBENCH_MAX_NEW_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
RULER_QA_MAX_NEW_TOKENS = 32
QUESTIONS_MAX_NEW_TOKENS = 64
RULER_MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}

# Field of a sample -> column names that may hold it; the first that the file has is read. Required are answers, and a prompt or what
# makes one.
COLUMNS = {
    "prompt": ("prompt",),
    "question": ("input", "question"),
    "context": ("context",),
    "answers": ANSWER_COLUMNS,
    "classes": ("all_classes",),
    "benchmark": ("benchmark",),
    "task": ("task",),
    "max_new_tokens": ("max_new_tokens", "max_gen_tokens"),
    "length": ("max_seq_length",),
}
PROMPT_FIELDS = ("prompt", "question", "context")


def find_columns(names: Sequence[str]) -> dict[str, str]:
    """Maps each field that has a column to that column's name."""
    return {key: next(n for n in options if n in names) for key, options in COLUMNS.items() if set(options) & set(names)}


class TaskFileReader:
    """Reads the samples of one file.

    Attributes:
        skipped: reason -> number of rows so far that could not be used.
    """

    def __init__(
        self,
        path: Path,
        benchmark: str | None = None,
        task: str | None = None,
        chat: ChatTemplate | None = None,
        metric: str = DEFAULT_METRIC,
    ):
        """
        Args:
            benchmark, task: of every row that does not name its own. If None, the file's name and folder tell.
            chat: renders prompts that are lists of chat messages; without it they are skipped.
            metric: scores questions that belong to no benchmark.
        """
        self.path, self.chat, self.metric = path, chat, metric
        self.benchmark = benchmark
        self.task = task
        self.skipped: Counter[str] = Counter()

    def samples(self) -> Iterator[Sample]:
        """Yields a sample for each usable row, in the file's order; its index is the row's number.

        Raises:
            UserError: if the file cannot be read or lacks a column, or a row's task is unknown or not the one asked for.
        """
        for number, row in self._rows():
            benchmark, task = self._identify(number, row)
            question = question_row(_prompt(benchmark, task, row), row.get("answers"), self.chat)
            if question.text is None:
                self.skipped[question.skip_reason] += 1
                continue
            classes = usable_answers(row.get("classes"))
            max_new_tokens = self._whole_number(number, row, "max_new_tokens")
            if max_new_tokens is None:
                max_new_tokens = default_max_new_tokens(benchmark, task)
            length = self._whole_number(number, row, "length")
            yield Sample(
                benchmark,
                task,
                number,
                question.text,
                question.answers,
                max_new_tokens,
                length,
                metric=self.metric if benchmark == QUESTIONS else "",
                classes=() if isinstance(classes, str) else classes,
            )

    def _rows(self) -> Iterator[tuple[int, dict]]:
        with reading(self.path):
            match format_of(self.path):
                case ".jsonl":
                    yield from self._objects(self._parsed_lines(), "line {}")
                case ".json":
                    values = json_array(read_whole(self.path), str(self.path))
                    yield from self._objects(((i, self._object(i, value)) for i, value in enumerate(values)), "object {}")
                case ".arrow":
                    with arrow_batches(self.path) as batches:
                        yield from self._batch_rows(batches, batches.schema.names)
                case _:
                    with CheckedParquetFile(self.path) as parquet:
                        found = self._check_columns(parquet.schema_arrow.names, "columns")
                        columns = list(dict.fromkeys(found.values()))
                        yield from self._batch_rows(self._parquet_batches(parquet, columns), columns)

    def _parquet_batches(self, parquet: CheckedParquetFile, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        for group in range(len(parquet.groups)):
            yield from group_batches(self.path, parquet, group, columns, BATCH_ROWS)

    def _batch_rows(self, batches: Iterable[pyarrow.RecordBatch], names: list[str]) -> Iterator[tuple[int, dict]]:
        found, number = self._check_columns(names, "columns"), 0
        for batch in batches:
            columns = {key: batch.column(name) for key, name in found.items()}
            for r in range(batch.num_rows):
                yield number, {key: cell_value(column[r]) for key, column in columns.items()}
                number += 1

    def _objects(self, values: Iterable[tuple[int, dict]], place: str) -> Iterator[tuple[int, dict]]:
        """Picks the fields of objects; checks that each has a prompt, and that any has answers."""
        first_keys, has = None, set()
        for number, value in values:
            first_keys = first_keys or list(value)
            found = find_columns(list(value))
            has |= set(found)
            if not set(PROMPT_FIELDS) & set(found):
                self._check_columns(list(value), f"keys in {place.format(number + 1)}")
            yield number, {key: value[column] for key, column in found.items()}
        if first_keys is None:
            raise UserError(f"{self.path} is empty")
        if "answers" not in has:
            self._check_columns(first_keys, "keys")

    def _parsed_lines(self) -> Iterator[tuple[int, dict]]:
        for number, line in enumerate(lines_of(self.path)):
            if line is None or not line.strip():
                self.skipped["empty line" if line is not None else too_long().skip_reason] += 1
                continue
            yield number, self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            values = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{self._place(number)}: not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._place(number)}: not JSON ({error})") from error
        return self._object(number, values)

    def _object(self, number: int, value: Any) -> dict:
        if not isinstance(value, dict):
            raise UserError(f"{self._place(number)}: not an object, but {value!r:.80}")
        return value

    def _check_columns(self, names: list[str], what: str) -> dict[str, str]:
        found = find_columns(names)
        for fields in (PROMPT_FIELDS, ("answers",)):
            if not set(fields) & set(found):
                wanted = " or ".join(repr(name) for field in fields for name in COLUMNS[field])
                raise UserError(f"{self.path} has no column {wanted}; {what} found: {', '.join(names) or 'none'}")
        return found

    def _identify(self, number: int, row: dict) -> tuple[str, str]:
        """Takes benchmark and task from the row, else from the caller, else from the file's name and folder."""
        row_task, row_benchmark = row.get("task"), row.get("benchmark")
        for key, said, asked in (("task", row_task, self.task), ("benchmark", row_benchmark, self.benchmark)):
            if isinstance(said, Row):
                raise UserError(f"{self._place(number)}: {key} is {said.skip_reason}")
            if said is not None and not isinstance(said, str):
                raise UserError(f"{self._place(number)}: {key} must be a string, found {said!r:.80}")
            if said is not None and asked is not None and said != asked:
                raise UserError(f"{self._place(number)}: {key} is {said!r}, but {asked!r} was asked for")
        task = row_task or self.task or task_of(self.path)
        benchmark = row_benchmark or self.benchmark or benchmark_of_task(task) or benchmark_of_folder(self.path) or QUESTIONS
        if benchmark == QUESTIONS:
            return QUESTIONS, re.sub(r"[^\w-]+", "_", task or bare_name(self.path))
        if task is None:
            raise UserError(
                f"{self._place(number)}: the task of {benchmark} is unknown; give the file a column 'task', "
                f"or name it for its task, such as hotpotqa_mine{format_of(self.path)} or ruler_squadqa_mine{format_of(self.path)}"
            )
        if benchmark == "perplexity":
            raise UserError(f"{self._place(number)}: benchmark 'perplexity' has no prompts with answers")
        try:
            check_task(benchmark, task)
        except UserError as error:
            raise UserError(f"{self._place(number)}: {error}") from error
        return benchmark, task

    def _place(self, number: int) -> str:
        return f"{self.path}, {f'line {number + 1}' if format_of(self.path) == '.jsonl' else f'row {number}'}"

    def _whole_number(self, number: int, row: dict, key: str) -> int | None:
        value = row.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer() or value < 1:
            raise UserError(f"{self._place(number)}: {key} is {value!r:.80}; allowed: a whole number from 1")
        return int(value)


def default_max_new_tokens(benchmark: str, task: str) -> int:
    """Number of answer tokens if a row does not say."""
    if benchmark == "longbench":
        return LONGBENCH_MAX_NEW_TOKENS[task]
    if benchmark == "ruler":
        return RULER_MAX_NEW_TOKENS[task.removeprefix("ruler_").split("_")[0]]
    return QUESTIONS_MAX_NEW_TOKENS if benchmark == QUESTIONS else RULER_QA_MAX_NEW_TOKENS


def _prompt(benchmark: str, task: str, row: dict) -> Any:
    """The prompt of a row: its own, or LongBench's template around its context and question, or one above the other."""
    if "prompt" in row:
        return row["prompt"]
    if "context" not in row:
        return row.get("question")
    is_longbench = benchmark == "longbench"
    has_question = asks_a_question(task) if is_longbench else "question" in row
    parts = [row["context"], row.get("question")] if has_question else [row["context"]]
    for part in parts:
        if not isinstance(part, str):
            return part  # whoever reads the row says why it cannot be used
    return longbench_prompt(task, *parts) if is_longbench else "\n\n".join(parts)


def task_of(path: Path) -> str | None:
    """Task that a file's name begins with, e.g. "hotpotqa" of "hotpotqa_16384.parquet"; None if it begins with none."""
    for task in sorted(LONGBENCH_METRICS, key=len, reverse=True):
        if is_named_for(path, task):
            return task
    found = re.match(r"(ruler_(?:niah_[a-z]+(?:_\d(?!\d))?|vt|cwe|fwe|[a-z0-9]+)|qa_\d+)(?=_|$)", bare_name(path))
    return found.group(1) if found else None


def is_named_for(path: Path, task: str) -> bool:
    """Whether a file is named after a task: exactly, or followed by an underscore and anything."""
    name = bare_name(path)
    return name == task or name.startswith(f"{task}_")


def bare_name(path: Path) -> str:
    """The name of a file without its suffix and that of a compression."""
    return Path(path.stem).stem if compression_of(path) else path.stem


def benchmark_of_task(task: str | None) -> str | None:
    """Benchmark that a task's name belongs to; None if the name does not tell."""
    if task is None:
        return None
    if task in LONGBENCH_METRICS:
        return "longbench"
    if RULER_FILE_NAMES.fullmatch(task):
        return "ruler"
    return "ruler_qa" if RULER_QA_NAMES.fullmatch(task) else None


def benchmark_of_folder(path: Path) -> str | None:
    """Benchmark that a file's folder is named after; None if it is named otherwise. `ruler/` means question answering."""
    return {"longbench": "longbench", "ruler": "ruler_qa", "ruler_qa": "ruler_qa"}.get(path.absolute().parent.name)
