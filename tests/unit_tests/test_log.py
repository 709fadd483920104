"""The log has one form, whoever writes it; colours only on a terminal; Ctrl-C ends a program that is still starting with one line."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from refine_titan import terminal
from refine_titan.terminal import (
    EscapedRecord,
    LogLines,
    begin_log,
    columns,
    folded,
    has_colour,
    leave_out_logger,
    share_columns,
    take_over_logger,
    without_warnings_of,
)

REPOSITORY = Path(__file__).parents[2]
TITAN = "/site-packages/torchtitan/train.py"
LINE = r"\[\d\d-\d\d \d\d:\d\d:\d\d\] "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch, capsys):
    """Begins the log of a program; returns what it has written since the last call."""
    root, level, handlers = logging.getLogger(), logging.getLogger().level, list(logging.getLogger().handlers)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with warnings.catch_warnings():
        monkeypatch.setattr(sys, "warnoptions", [])
        begin_log()
        yield lambda: capsys.readouterr().out
    root.handlers[:], root.level = handlers, level


def emit(message: str, path: str = TITAN, level: int = logging.INFO) -> None:
    logging.getLogger().handle(EscapedRecord("root", level, path, 1, message, (), None))


def test_everyone_writes_the_same_line(log):
    library = logging.getLogger("a_library")
    library.handlers, library.propagate = [logging.StreamHandler(io.StringIO())], False
    take_over_logger("a_library")
    emit("\x1b[34mModel \x1b[31msize\x1b[39m")
    library.warning("low on %s", "memory")
    warnings.warn("too short", stacklevel=1)
    first, second, third = log().splitlines()
    assert re.fullmatch(LINE + "Model size", first) and re.fullmatch(LINE + "WARNING low on memory", second)
    assert re.fullmatch(LINE + rf"WARNING UserWarning: too short \({__file__}:\d+\)", third)


def test_lines_know_their_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert columns() == 100
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]:")
    share_columns()  # standard output is no terminal here
    assert os.environ["COLUMNS"] == "92" and columns() == 92
    monkeypatch.delenv("COLUMNS")
    assert columns() == 100
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    assert columns() == 80


def test_loggers_of_libraries_write_through_the_log_or_not_at_all(log):
    for name in ("talkative", "talkative.part", "talkative.__trace", "quiet.part"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [logging.StreamHandler(io.StringIO())], False
    take_over_logger("talkative")
    leave_out_logger("quiet")
    for name in ("talkative", "talkative.part", "talkative.__trace", "quiet.part"):
        logging.getLogger(name).error(name)
    assert [re.sub(LINE, "", line) for line in log().splitlines()] == ["ERROR talkative", "ERROR talkative.part"]


def test_library_that_is_imported_does_not_warn(log):
    with without_warnings_of("imported"):
        logging.getLogger("imported").warning("no kernel")
        logging.getLogger("imported").error("broken")
    logging.getLogger("imported").warning("later")
    assert [re.sub(LINE, "", line) for line in log().splitlines()] == ["ERROR broken", "WARNING later"]


def test_warnings_for_programmers_are_left_out(log):
    warnings.warn("FSDP2-wrapped module (FSDPBlock) returned a view tensor. An in-place op", stacklevel=1)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.warn("this name will go", category, stacklevel=1)
    assert log() == ""


def test_noise_of_torchtitan_is_left_out_and_the_rest_reads_well(log):
    for noise in (
        "Error running lspci: [Errno 2] No such file or directory: 'lspci', fallback to use device_name",
        "Peak flops undefined for: x86_64, fallback to A100",
        "Peak FLOPS used for computing MFU: 3.120e+14",
        "[GC] Performing periodic GC collection took 0.05 seconds",
        'Building delta_net debugwith {\n  "dim": 256\n}',
        "Sleeping 2 seconds for other ranks to complete",
        "Starting job: default job",
    ):
        emit(noise)
    assert log() == ""
    emit("Finished saving the checkpoint (or staging if async is enabled)in 0.52 seconds.")
    emit("Starting job: my job")
    emit("Error running lspci", path="/a/refine_titan/b.py")  # whatever is not torchtitan's stays
    lines = [re.sub(LINE, "", line) for line in log().splitlines()]
    assert lines == ["Checkpoint written in 0.52 s", "Starting job: my job", "Error running lspci"]


def test_messages_that_are_put_in_other_words_are_those_of_this_torchtitan():
    import torchtitan

    source = "".join(path.read_text() for path in Path(torchtitan.__file__).parent.rglob("*.py"))
    for fixed in (
        "Error running lspci",
        "Peak flops undefined for",
        "Peak FLOPS used for computing MFU",
        "Sleeping 2 seconds for other ranks",
        "Finished saving the checkpoint (or staging if async is enabled)",
        "Finished loading the checkpoint in",
        "Checkpointing active. Checkpoints will be loaded from and saved to",
        "Trainer is initialized with",
        "memory usage for model",
    ):
        assert fixed in source, fixed
        assert any(re.search(re.escape(fixed[:12]), re.sub(r"\\", "", pattern.pattern)) for pattern, _ in terminal._OTHER_WORDS), fixed


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour(Terminal()) and not has_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())
    for colour, expected in ((True, "\x1b[33mWARNING\x1b[0m careful"), (False, "WARNING careful")):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        LogLines(colour).handle(EscapedRecord("root", logging.WARNING, "p", 1, "careful", (), None))
        assert sys.stdout.getvalue().rstrip("\n").partition("] ")[2] == expected


@pytest.mark.parametrize("module", ["refine_titan.train", "refine_titan.launch"])
def test_ctrl_c_during_imports_is_one_line(module):
    """The signal comes while torch is imported, which takes seconds."""
    # A shell's background job inherits an ignored SIGINT.
    program = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    program += f"os.execv(sys.executable, [sys.executable, '-m', '{module}'])"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "Interrupted.\n")


def test_long_lines_are_folded_below_their_text_on_a_terminal(monkeypatch):
    text = "model:      delta_net\nmemory:     " + ", ".join(f"{i} MiB for weights" for i in range(6)) + "\n  " + "x" * 90
    assert folded(text) == text
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    lines = folded(text).split("\n")
    assert lines[0] == "model:      delta_net" and lines[-1] == "  " + "x" * 90  # a word stays whole
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines[:3])
    assert lines[2].startswith(" " * 12) and f"{lines[1]} {lines[2].strip()}" == text.split("\n")[1]
