"""Preparation, conversion and evaluation on a machine that fails: every place that they read and write, and every fault there."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from refine_titan.conversion.dcp_metadata import CheckedReader
from refine_titan.conversion.from_hf import from_hf
from refine_titan.models import FAMILIES
from refine_titan.preparation.continuation import WORK_FOLDER
from tests.checkpoints import random_weights, write_hf_folder
from tests.evaluation_runs import sample_lines, write_run
from tests.integration_tests.faults.machine import Fault, Machine, Outcome
from tests.integration_tests.faults.matrix import cell
from tests.integration_tests.runs import TINY
from tests.training_runs import write_training_run
from tests.unit_tests.preparation.made_up import write_corpus

ARGS = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, dim=64, n_heads=1)
FAILED, INTERRUPTED = 1, 130
REASONS = {"disk full": "No space left on device", "EIO": "Input/output error", "EIO while syncing": "Input/output error"}


@dataclass(frozen=True)
class Command:
    """A command of the product.

    Attributes:
        name: of the table's rows.
        arguments: what it is called with; {out} is its output, {place} a folder that the calls of a test share.
        written: place -> (call, pattern) of what it writes; {out} is its output, {partial} the hidden folder in which that is made.
        read: place -> pattern of what it reads.
        content: what must be the same after every fault, of an output.
        ranks: how many ranks of a launcher share the work.
        in_workers: places that processes write which the command starts.
        stopped: its exit status after SIGTERM.
        is_all_or_nothing: whether a fault leaves nothing of the output.
        begins_with: a folder of which the output is a copy before the command adds to it; None for a new one.
    """

    name: str
    arguments: tuple
    written: dict[str, tuple[str, str]]
    read: dict[str, str]
    content: Callable[[Path], dict]
    ranks: int = 1
    in_workers: tuple[str, ...] = ()
    stopped: int = INTERRUPTED
    is_all_or_nothing: bool = False
    begins_with: Path | None = None

    def run(self, machine: Machine, out: Path, fault: Fault | None = None) -> Outcome:
        launch = ["-m", "refine_titan.launch", f"--nproc-per-node={self.ranks}", "--rdzv-backend=loopback"] if self.ranks > 1 else []
        arguments = [str(argument).format(out=out, place=out.parent.parent) for argument in self.arguments]
        if self.begins_with is not None and not out.exists():
            shutil.copytree(self.begins_with, out)
        return machine.run(*launch, *arguments, fault=fault, folder=out.parent)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_path(folder: Path) -> dict[str, bytes]:
    """The bytes of files that name their folder."""
    return {name: content.replace(str(folder).encode(), b"") for name, content in file_bytes(folder).items()}


def records(folder: Path) -> dict:
    """The records of a DCP checkpoint, and the bytes of its other files; `.metadata` has no order of its own."""
    reader, others = CheckedReader(folder), file_bytes(folder)
    found = {str(index): reader.read_record(index) for index in reader.read_metadata().storage_data}
    return found | {name: content for name, content in others.items() if not re.search(r"\.metadata|\.distcp|_checksums", name)}


def answers(folder: Path) -> dict:
    """The samples of an evaluation without their times, its results, and the names of its files."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
    scores = [row.get("score") for row in json.loads((folder / "results.json").read_text())["tasks"]]
    return {"samples": samples, "scores": scores, "files": sorted(file_bytes(folder))}


def answers_and_kept(folder: Path) -> dict:
    """Those of an evaluation, and the samples that it has generated and kept for others."""
    return answers(folder) | {"kept": file_bytes(folder.parent.parent / "kept")}


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    folder = tmp_path_factory.mktemp("inputs")
    hf = write_hf_folder(folder / "hf", ARGS, random_weights(ARGS))
    (hf / "vocab.json").write_text("{}")  # an asset, which is copied
    from_hf(hf, folder / "dcp")
    corpus = write_corpus(folder / "corpus")
    rows = [{"prompt": f"Question {i}?", "answers": [str(i)], "max_new_tokens": 2} for i in range(3)]
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ("tools/prepare_data.py", "run", "--input", corpus, "--tokenizer", "bytes", "--output", "{out}", "--unit-bytes", 4000)
    partial, made = "*/.out.partial", "*/.out.*.partial"
    work = f"{partial}/{WORK_FOLDER}"
    preparation = Command(
        "preparation",
        (*prepare, "--workers", 1),
        {
            "folder": ("mkdir", work),
            "lock": ("create", f"{work}/lock"),
            "call": ("write", f"{work}/.call.json*"),
            "units": ("write", f"{work}/.*.arrow.*"),
            "reports of units": ("write", f"{work}/.[0-9u]*.json.*"),
            "shards": ("write", f"{partial}/.shard-*.parquet*"),
            "descriptions of shards": ("write", f"{work}/.shard-*.json*"),
            "manifest": ("write", f"{partial}/.manifest.json*"),
            "manifest's name": ("rename", f"{partial}/manifest.json"),
            "output's name": ("rename", "*/out"),
        },
        {"jsonl": "*/corpus/a.jsonl", "parquet": "*/corpus/b.parquet", "gzip": "*/corpus/c.jsonl.gz", "text": "*/corpus/sub/e.txt"},
        file_bytes,
    )
    conversion = {
        "from-hf": Command(
            "from-hf",
            ("tools/convert_checkpoint.py", "from-hf", hf, "{out}"),
            {
                "folder": ("mkdir", made),
                "config.json": ("write", f"{made}/config.json"),
                "tokenizer": ("write", f"{made}/vocab.json"),
                "data": ("write", f"{made}/__0_3.distcp"),
                "checksums": ("write", f"{made}/__0_checksums.json"),
                "metadata": ("write", f"{made}/.metadata.tmp"),
                "metadata's checksum": ("write", f"{made}/.metadata.xxh3"),
                "metadata's name": ("rename", f"{made}/.metadata"),
                "output's name": ("rename", "*/out"),
            },
            {"config.json": f"{hf}/config.json", "weights": f"{hf}/model.safetensors", "tokenizer": f"{hf}/vocab.json"},
            records,
            is_all_or_nothing=True,
        ),
        "to-hf": Command(
            "to-hf",
            ("tools/convert_checkpoint.py", "to-hf", folder / "dcp", "{out}", "--max-shard-size", "200KB"),
            {
                "folder": ("mkdir", made),
                "config.json": ("write", f"{made}/config.json"),
                "weights": ("write", f"{made}/[!c]*"),
                "index": ("write", f"{made}/model.safetensors.index.json"),
                "output's name": ("rename", "*/out"),
            },
            {
                "config.json": "*/dcp/config.json",
                "metadata": "*/dcp/.metadata",
                "checksums": "*/dcp/__0_checksums.json",
                "data": "*/__0_4.distcp",
            },
            file_bytes,
            is_all_or_nothing=True,
        ),
    }
    tasks = ["--tasks", folder / "hotpotqa.jsonl", "--evaluation.batch_size", 1]
    evaluation = Command(
        "evaluation",
        ("tools/evaluate.py", "run", TINY, "--model.flavor", hf / "config.json", "--checkpoint", hf, *tasks, "--output", "{out}"),
        {
            "folder": ("mkdir", "*/out"),
            "lock": ("create", "*/out/lock"),
            "run.json": ("write", "*/out/.run.json*"),
            "samples": ("write", "*/out/samples.jsonl"),
            "results.json": ("write", "*/out/.results.json*"),
            "results.md": ("write", "*/out/.results.md*"),
            "results.tex": ("write", "*/out/.results.tex*"),
            "results.csv": ("write", "*/out/.results.csv*"),
            "report": ("write", "*/out/.report.html*"),
            "report's name": ("rename", "*/out/report.html"),
        },
        {"config.json": f"{hf}/config.json", "weights": f"{hf}/model.safetensors", "tasks": "*/hotpotqa.jsonl"},
        answers,
        stopped=75,
    )
    by_workers = ("units", "reports of units", "shards", "descriptions of shards")
    workers = replace(
        preparation,
        name="preparation, 2 workers",
        arguments=(*prepare, "--workers", 2),
        in_workers=by_workers,
        written={place: preparation.written[place] for place in (*by_workers, "manifest")},
    )
    ranks = replace(evaluation, name="evaluation, 2 ranks", ranks=2)
    generated = replace(
        evaluation,
        name="evaluation, RULER",
        arguments=(*evaluation.arguments, "--tasks", "ruler/niah_single_1", "--lengths", 640, "--evaluation.dump_folder", "{place}/kept"),
        written={"generated samples": ("write", "*/kept/generated/ruler/*/.0.json*")},
        read={},
        content=answers_and_kept,
    )
    return {
        command.name: command for command in (preparation, workers, *conversion.values(), evaluation, ranks, generated, *reports(folder))
    }


def reports(folder: Path) -> list[Command]:
    """The commands that make pages, tables and charts of what others have written."""
    tasks = {("ruler", "vt", 4096): (3, 0.5)}
    first, second = (write_run(folder / name, sample_lines(tasks, seed), name=name) for seed, name in enumerate(("first", "second")))
    run = write_training_run(folder / "run", steps=4, rollouts_per_step=1)
    page = {"page": ("write", "*/out/.report.html*"), "page's name": ("rename", "*/out/report.html")}
    tables = {"folder": ("mkdir", "*/out"), "charts' folder": ("mkdir", "*/out/charts"), "charts": ("write", "*/out/charts/.*")}
    tables |= {name: ("write", f"*/out/.{name}*") for name in ("table.md", "table.tex", "table.csv")}
    outputs = ("--markdown", "{out}/table.md", "--latex", "{out}/table.tex", "--csv", "{out}/table.csv", "--svg", "{out}/charts")
    samples = {"run.json": f"{first}/run.json", "samples": f"{first}/samples.jsonl"}
    results = {f"results.{kind}": ("write", f"*/out/.results.{kind}*") for kind in ("json", "md", "tex", "csv")}
    comparison = (*outputs, "--html", "{out}/page.html")
    return [
        Command(
            "report of a run",
            ("tools/report.py", "{out}"),
            page,
            {"metrics": "*/out/metrics.jsonl", "rollouts": "*/out/rollouts.jsonl"},
            without_path,
            begins_with=run,
        ),
        Command(
            "report of an evaluation",
            ("tools/report.py", "{out}"),
            results | page,
            {"run.json": "*/out/run.json", "samples": "*/out/samples.jsonl"},
            file_bytes,
            begins_with=first,
        ),
        Command("report of two evaluations", ("tools/report.py", first, second, *outputs), tables, samples, file_bytes),
        Command(
            "comparison",
            ("tools/compare.py", first, second, *comparison),
            tables | {"page": ("write", "*/out/.page.html*"), "page's name": ("rename", "*/out/page.html")},
            samples,
            file_bytes,
        ),
    ]


@pytest.fixture(scope="module")
def expected(machine, commands, tmp_path_factory) -> Callable[[str], dict]:
    """The content that a command gives without faults."""
    found = {}

    def of(name: str) -> dict:
        if name not in found:
            out = tmp_path_factory.mktemp(name) / "out"
            outcome = commands[name].run(machine, out)
            assert outcome.status == 0, outcome.errors
            found[name] = commands[name].content(out)
        return found[name]

    return of


REPORTS = ("report of a run", "report of an evaluation", "report of two evaluations", "comparison")
NAMES = ("preparation", "preparation, 2 workers", "from-hf", "to-hf", "evaluation", "evaluation, 2 ranks", "evaluation, RULER", *REPORTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["disk full", "EIO", "EIO while syncing", "SIGKILL", "SIGTERM twice"])
def test_written(machine, commands, expected, tmp_path, name, fault):
    """At every place that a command writes. The same command then gives what it gives without faults, and leaves no other file."""
    command, failed = commands[name], []
    for place, (call, pattern) in command.written.items():
        if fault == "EIO while syncing":
            if call != "write" or place == "checksums":
                continue
            call = "sync"
            pattern = pattern.replace(".metadata.tmp", ".metadata")
        action = {"disk full": "ENOSPC", "SIGKILL": "kill", "SIGTERM twice": "term"}.get(fault, "EIO")
        out = tmp_path / re.sub(r"\W", "-", place) / "out"
        out.parent.mkdir()
        try:
            with cell(f"{name}, {place}", fault):
                outcome = command.run(machine, out, Fault(call, action, pattern, count=1 if action == "term" else 0))
                if fault == "SIGKILL" and place in command.in_workers:
                    assert_one_error(outcome, FAILED, "a worker process ended by signal SIGKILL")
                elif fault == "SIGKILL":
                    assert outcome.status == (-signal.SIGKILL if command.ranks == 1 else 1)
                elif fault == "SIGTERM twice":
                    assert outcome.status in (command.stopped, 0) and "Traceback" not in outcome.errors, outcome.errors[-3000:]
                else:
                    assert_one_error(outcome, FAILED, REASONS[fault])
                if name in REPORTS and out.exists():
                    assert_whole(command.content(out), command.begins_with, expected(name))
                if outcome.status == 0 or f"Interrupted; {out} is complete" in outcome.errors:  # the signal came when all was done
                    assert fault == "SIGTERM twice" and command.content(out) == expected(name)
                    shutil.rmtree(out)
                elif command.is_all_or_nothing and fault != "SIGKILL":
                    assert list(out.parent.iterdir()) == []
                again = command.run(machine, out)
                assert again.status == 0, again.errors
                assert command.content(out) == expected(name)
                assert [path.name for path in out.parent.iterdir()] == ["out"]
        except AssertionError as error:
            failed.append(f"{place}: {error}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["EIO", "cannot be opened"])
def test_read(machine, commands, expected, tmp_path, name, fault):
    """At every place that a command reads: the error names the file."""
    command, failed = commands[name], []
    for place, pattern in command.read.items():
        out = tmp_path / re.sub(r"\W", "-", place) / "out"
        out.parent.mkdir()
        try:
            with cell(f"{name}, reading {place}", fault):
                injected = Fault("read", "EIO", pattern) if fault == "EIO" else Fault("open", "EACCES", pattern)
                outcome = command.run(machine, out, injected)
                reason = "Input/output error" if fault == "EIO" else "Permission denied"
                assert_one_error(outcome, FAILED, Path(pattern).name, reason)
                again = command.run(machine, out)
                assert again.status == 0 and command.content(out) == expected(name), again.errors
        except AssertionError as error:
            failed.append(f"{place}: {error}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("name, pattern", [("preparation", f"*/{WORK_FOLDER}/lock"), ("evaluation", "*/out/lock")])
@pytest.mark.parametrize("fault", ["ENOLCK", "EIO"])
def test_lock(machine, commands, expected, tmp_path, name, pattern, fault):
    command, out = commands[name], tmp_path / "out"
    with cell(f"{name}, lock taken", fault):
        outcome = command.run(machine, out, Fault("lock", fault, pattern))
        if fault == "ENOLCK":
            assert outcome.status == 0 and "is on a file system without locks" in outcome.output + outcome.errors
        else:
            assert_one_error(outcome, FAILED, "lock", "Input/output error")
            assert command.run(machine, out).status == 0
        assert command.content(out) == expected(name)


def assert_whole(found: dict[str, bytes], before: Path | None, expected: dict[str, bytes]) -> None:
    """Every file that a reader sees is as it was before the command, or as the command makes it."""
    old = file_bytes(before) if before is not None else {}
    for name, content in found.items():
        if not Path(name).name.startswith("."):
            assert content in (old.get(name), expected[name]), f"{name} is half written"


def assert_one_error(outcome: Outcome, status: int, *parts: str) -> None:
    """The command ended with one line that has all parts."""
    everything = outcome.output + outcome.errors
    assert outcome.status == status and "Traceback" not in everything, everything[-4000:]
    [line] = outcome.error_lines
    for part in parts:
        assert part in line, line
