"""Keeps the finished samples of an evaluation as JSON lines; a batch is on disk before the next one begins."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torchtitan.tools.logging import logger

from refine_titan.benchmarks.samples import Sample
from refine_titan.errors import UserError
from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.json_lines import DamagedLines
from refine_titan.files.reasons import naming
from refine_titan.files.whole_files import write_atomically
from refine_titan.report.records import SAMPLES_FILE, parsed_samples


class SampleKey(NamedTuple):
    """Identifies a sample among those of an evaluation."""

    benchmark: str
    task: str
    length: int | None
    index: int

    @classmethod
    def from_sample(cls, sample: Sample) -> "SampleKey":
        return cls(sample.benchmark, sample.task, sample.length, sample.index)

    def __str__(self) -> str:
        return f"{self.benchmark}/{self.task}, sample {self.index}" + (f" of length {self.length}" if self.length else "")


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class SampleLog:
    """The file `samples.jsonl` of a folder.

    Attributes:
        lines: samples on disk, as their lines have them.
    """

    def __init__(self, folder: Path):
        """Opens the file and reads its lines. Drops a half-written last line, and damaged ones, which a warning names.

        Raises:
            UserError: if a line holds something else than a finished sample, or a sample has two lines.
        """
        self.path = folder / SAMPLES_FILE
        with naming(self.path):
            self._drop_half_a_line()
        self._file = AppendedFile(self.path)
        self.lines: dict[SampleKey, dict[str, Any]] = {}
        damaged = DamagedLines(self.path)
        for _, record in parsed_samples(self.path, damaged):
            self._add(_key(record), record)
        if damaged:
            logger.warning(f"{damaged}; their samples are run again")
            self._write_anew()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes lines and waits until they are on disk.

        Raises:
            OSError: they cannot be written; the error names the file.
        """
        lines = list(lines)
        self._file.append_to_disk(_encode(lines))
        for line in lines:
            self._add(_key(line), line)

    def put_in_order(self, samples: Iterable[Sample]) -> None:
        """Puts the lines of finished samples into the order of `samples`, if they have another."""
        keys = [key for key in map(SampleKey.from_sample, samples) if key in self.lines]
        if keys == list(self.lines):
            return
        self.lines = {key: self.lines[key] for key in (*keys, *self.lines)}
        self._write_anew()

    def close(self) -> None:
        self._file.close()

    def require_same_prompt(self, sample: Sample, prompt_sha256: str) -> None:
        """Raises UserError if the sample is on disk with another prompt."""
        key = SampleKey.from_sample(sample)
        if key in self.lines and self.lines[key]["prompt_sha256"] != prompt_sha256:
            raise UserError(
                f"{self.path}: {key} has another prompt than it has now: the task's file, or what generates it, has changed; "
                "give another --output, or remove the folder"
            )

    def _write_anew(self) -> None:
        write_atomically(self.path, [_encode(self.lines.values())])
        self._file.close()
        self._file = AppendedFile(self.path)

    def _drop_half_a_line(self) -> None:
        with self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))

    def _add(self, key: SampleKey, line: dict[str, Any]) -> None:
        if key in self.lines:
            raise UserError(f"{self.path} has {key} twice; remove one of the lines, or the file")
        self.lines[key] = line


def _encode(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "backslashreplace")


def _key(line: dict[str, Any]) -> SampleKey:
    return SampleKey(line["benchmark"], line["task"], line["length"], line["index"])
