"""The command line of `tools/prepare_data.py` in processes of its own: several workers, kills, interrupts, messages."""

import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_titan.preparation.pool import Pool
from refine_titan.preparation.run import partial_folder
from tests.unit_tests.preparation.made_up import call, content, write_corpus, write_jsonl

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
TIMEOUT = 300


def command(*arguments) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def tool(*arguments, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT, **keywords)


def large_corpus(folder: Path) -> Path:
    """One file, of which a process can do hundreds of units before another notices."""
    folder.mkdir()
    rng = random.Random(0)
    write_jsonl(folder / "a.jsonl", [rng.randbytes(1000).hex() for _ in range(2000)])
    return folder


def run_arguments(source: Path, output: Path, *more) -> list:
    return [
        "run",
        "--input",
        source,
        "--tokenizer",
        "bytes",
        "--output",
        output,
        "--deduplicate",
        "exact",
        "--unit-bytes",
        20000,
        "--shard-tokens",
        1_000_000,
        *more,
    ]


def started(source: Path, output: Path, *more) -> subprocess.Popen:
    """A run of which some units are done, and not all."""
    process = subprocess.Popen(
        command(*run_arguments(source, output, *more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    while len(list(partial_folder(output).glob("work/*.json"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)


def test_workers_give_the_bytes_of_one_process(tmp_path):
    source = write_corpus(tmp_path / "in")
    settings = {"deduplicate": "exact", "seed": 3, "min_tokens": 30, "shard_tokens": 2000}
    call(source, tmp_path / "one", **settings)
    call(source, tmp_path / "two", workers=2, unit_bytes=700, **settings)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_run_goes_on_to_the_same_bytes(tmp_path, workers):
    source = large_corpus(tmp_path / "in")
    call(source, tmp_path / "expected", deduplicate="exact", shard_tokens=1_000_000, unit_bytes=20000)
    process = started(source, tmp_path / "out", "--workers", workers)
    workers_left = children(process.pid)
    assert len(workers_left) >= (workers if workers > 1 else 0)
    process.kill()
    process.communicate()
    wait_until_gone(workers_left)
    done = {path.name: path.stat().st_mtime_ns for path in partial_folder(tmp_path / "out").glob("work/*.json")}
    assert len(done) >= 6 and not (tmp_path / "out").exists()
    refused = tool(*run_arguments(source, tmp_path / "out", "--workers", workers, "--min-tokens", 5))
    assert refused.returncode == 1 and "--min-tokens was 1 and is 5" in refused.stderr
    result = tool(*run_arguments(source, tmp_path / "out", "--workers", workers))
    assert result.returncode == 0, result.stderr
    resumed = int(result.stdout.split(" units by an earlier call")[0].split(", ")[-1].split(" of ")[0])
    assert resumed >= len([name for name in done if name[0] == "0"]) - 1  # call.json is no unit
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("workers, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGINT)])
def test_interrupt_ends_within_seconds_and_says_how_to_go_on(tmp_path, workers, number):
    source = large_corpus(tmp_path / "in")
    process = started(source, tmp_path / "out", "--workers", workers)
    workers_left = children(process.pid)
    begin = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"kept in {partial_folder(tmp_path / 'out')}: repeat the command to continue" in errors
    wait_until_gone(workers_left)


@pytest.mark.slow
def test_second_process_on_the_same_output_is_refused(tmp_path):
    source = large_corpus(tmp_path / "in")
    process = started(source, tmp_path / "out", "--workers", 1)
    process.send_signal(signal.SIGSTOP)
    try:
        result = tool(*run_arguments(source, tmp_path / "out"))
    finally:
        process.send_signal(signal.SIGCONT)
    assert result.returncode == 1 and "another process is preparing data in" in result.stderr
    assert process.wait(TIMEOUT) == 0


@pytest.mark.slow
def test_worker_that_dies_is_reported(tmp_path):
    source = large_corpus(tmp_path / "in")
    process = started(source, tmp_path / "out", "--workers", 2)
    worker = next(pid for pid in children(process.pid) if b"worker_process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "a worker process ended by signal SIGKILL during process_unit; memory may have run out" in errors
    assert "Traceback" not in errors and "repeat the command to continue" in errors


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_file_that_cannot_grow_is_one_line(tmp_path, workers):
    """A limit on the size of files stands for a full disk: the system refuses the write."""
    source = large_corpus(tmp_path / "in")
    result = tool(
        *run_arguments(source, tmp_path / "out", "--workers", workers, "--unit-bytes", 1 << 22),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "File too large" in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))


def fail(kind: str):
    raise {"file": FileNotFoundError(2, "No such file", "a name"), "defect": ZeroDivisionError("by zero")}[kind]


def test_pool_hands_errors_of_workers_on():
    with Pool(2) as pool:
        with pytest.raises(OSError, match="No such file") as error:
            list(pool.run(fail, [("file",)]))
        assert error.value.filename == "a name"
        with pytest.raises(RuntimeError, match="failed during fail:\n(.*\n)*ZeroDivisionError: by zero"):
            list(pool.run(fail, [("defect",)]))


def in_process(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Status and output of the tool, run in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)
    return end.value.code, *capsys.readouterr()


def test_commands_and_messages(tmp_path, monkeypatch, capsys):
    def result(*arguments):
        return in_process(monkeypatch, capsys, *arguments)

    status, text, _ = result("--list-recipes")
    assert status == 0 and "hf download DKYoon/SlimPajama-6B" in text and text.count("--kind") == 2
    out = ["--output", tmp_path / "out"]
    assert result("run", "--input", tmp_path / "no", "--tokenizer", "bytes", *out) == (
        1,
        "",
        f"error: --input {tmp_path / 'no'}: no such file or folder\n",
    )
    run = ["run", "--input", write_corpus(tmp_path / "in"), "--tokenizer", "bytes", *out, "--workers", 1]
    assert result(*run, "--workers", 0)[::2] == (1, "error: --workers is 0; allowed: at least 1\n")
    assert result(*run, "--recipe", "ruler-squadqa")[0] == 1
    assert "invalid choice: 'c4'" in result(*run, "--recipe", "c4")[2]
    status, text, errors = result(*run, "--min-tokens", 30, "--suffixes", ".jsonl", ".txt")
    assert (status, errors) == (0, "") and text.startswith("documents: 56 with ") and "skipped:   2 too short" in text
    assert "was already complete" in result(*run, "--min-tokens", 30, "--suffixes", ".jsonl", ".txt")[1]
    assert result(*run)[0] == 1
    status, text, _ = result("show", tmp_path / "out")
    assert status == 0 and "a.jsonl: 27 rows" in text
    assert result("verify", tmp_path / "out")[:2] == (0, f"{tmp_path / 'out'}: every shard is as the manifest says\n")
    shard = tmp_path / "out" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" + shard.read_bytes()[-8:])
    status, _, errors = result("verify", tmp_path / "out")
    assert status == 1 and errors.startswith(f"error: {shard} has the sha256")
    assert result("verify", tmp_path / "nowhere")[0] == result("show", tmp_path / "nowhere")[0] == 1
