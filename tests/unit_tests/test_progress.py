"""Long work says how far it is, on a terminal and in a log."""

import io
import re

import pytest

from refine_titan import progress
from refine_titan.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands for `time`; it moves when told."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def test_lines_without_a_terminal(clock, capsys):
    with Progress("reading", 4_000_000_000, "bytes") as reading:
        for clock.now in (10.0, 31.0, 40.0, 62.0):
            reading.advance(1_000_000_000)
    captured = capsys.readouterr()
    assert captured.err == "reading: 2.0 of 4.0 GB  eta 0:31\nreading: 4.0 of 4.0 GB  eta 0:00\n" and captured.out == ""


def test_no_lines_where_the_caller_writes_its_own(clock, capsys):
    with Progress("training", 3, "steps", seconds_between_lines=None) as training:
        for clock.now in (100.0, 200.0):
            training.advance()
        training.write_line()
        training.print("step 2/3 [bold] of the caller")
    assert capsys.readouterr().err == "step 2/3 [bold] of the caller\n"


def test_time_left_follows_the_work_and_not_the_amount(clock):
    with Progress("evaluating", 4, "samples", done=1, work=4000, stream=io.StringIO(), seconds_between_lines=0.0) as evaluating:
        assert evaluating.time_left == ""  # nothing is known yet
        clock.now = 30.0
        evaluating.advance(1, tokens=1500, work=1000, others=["vt 0.250", "\x1b[2Jname 1.000"])
        assert evaluating.time_left == "1:30"
        assert evaluating.console.file.getvalue() == "evaluating: 2/4 samples  50 tok/s  eta 1:30  vt 0.250  \\x1b[2Jname 1.000\n"


def test_slow_beginning_is_forgotten(clock):
    """The first step of a run may compile for minutes."""
    with Progress("training", 1000, "steps", seconds_between_lines=None) as training:
        clock.now = 500.0
        training.advance()
        assert training.time_left == duration(999 * 500)
        for _ in range(31):
            clock.now += 1.0
            training.advance()
        assert training.time_left == duration(968)


def test_share_counts_what_an_earlier_call_did(capsys):
    with Progress("tokenizing   ", 200, "share", done=100, seconds_between_lines=0.0) as tokenizing:
        tokenizing.advance(50)
    assert capsys.readouterr().err.startswith("tokenizing: 75.0%  eta ")
    with Progress("reading", 0, "share") as empty:
        assert empty.time_left == ""


@pytest.mark.parametrize(("width", "shown"), [(80, "niah_single_1 0.500"), (120, "niah_single_1 0.500  vt 0.250  a_task_of_mine 1.000")])
def test_bar_fits_the_terminal(width, shown, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress("evaluating", 3, "samples", stream=stream) as evaluating:
        clock.now = 1.0
        evaluating.advance(tokens=1000, others=["niah_single_1 0.500", "vt 0.250", "a_task_of_mine 1.000"])
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    assert re.fullmatch(rf"evaluating [━╸╺]{{16}} 1/3 1,000 tok/s  eta 0:02  {re.escape(shown)} *", lines[-1])


def test_durations():
    assert [duration(seconds) for seconds in (0, 87, 3599.6, 7287)] == ["0:00", "1:27", "1:00:00", "2:01:27"]
