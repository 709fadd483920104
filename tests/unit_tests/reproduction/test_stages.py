"""Stages as real processes: their order, resumption and failures, and that none is left running."""

import os
import sys
import time
from pathlib import Path

import pytest

from refine_titan.reproduction import stages
from refine_titan.reproduction.stages import Stage, StageFailed, run_stages


def stage(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> Stage:
    """Makes a stage that runs `code`, then appends NAME to folder/order and makes folder/NAME."""
    end = f"\nopen('order', 'a').write('{name} ')\nopen('{name}', 'w').close()"
    return Stage(name, (sys.executable, "-c", code + end), (folder / name).is_file, needs)


def run(folder: Path, *given: Stage, num_jobs: int = 2) -> list[str]:
    lines: list[str] = []
    run_stages(given, num_jobs, folder / "logs", folder, dict(os.environ), lines.append)
    return lines


def test_stages_wait_for_those_they_need_and_run_at_once_otherwise(tmp_path):
    meet = "import time, pathlib\nwhile not pathlib.Path('{}').exists(): time.sleep(0.02)"
    given = [
        stage(tmp_path, "last", "", needs=("left", "right")),
        stage(tmp_path, "left", "open('left_began', 'w').close()\n" + meet.format("right_began"), needs=("first",)),
        stage(tmp_path, "right", "open('right_began', 'w').close()\n" + meet.format("left_began"), needs=("first",)),
        stage(tmp_path, "first", ""),
    ]
    lines = run(tmp_path, *given)
    order = (tmp_path / "order").read_text().split()
    assert order[0] == "first" and order[-1] == "last" and sorted(order[1:3]) == ["left", "right"]
    assert lines[-1].startswith("[4/4] last: done in")


def test_what_is_done_is_not_run_again(tmp_path):
    (tmp_path / "first").touch()
    lines = run(tmp_path, stage(tmp_path, "first", "raise SystemExit(1)"), stage(tmp_path, "second", "", needs=("first",)))
    assert (
        lines[0] == "1 of 2 stages are done already"
        and lines[1].startswith("second: begins; its log is ")
        and (tmp_path / "order").read_text() == "second "
    )


def test_failure_ends_the_others_and_shows_the_log(tmp_path):
    slow = stage(tmp_path, "slow", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    wrong = "import pathlib, time\nwhile not pathlib.Path('pid').exists() or not pathlib.Path('pid').read_text(): time.sleep(0.02)"
    failing = stage(tmp_path, "failing", wrong + "\nprint('first line')\nprint('what went wrong')\nraise SystemExit(3)")
    lines: list[str] = []
    with pytest.raises(StageFailed, match="stage failing ended with status 3: what went wrong") as error:
        run_stages((slow, failing), 2, tmp_path / "logs", tmp_path, dict(os.environ), lines.append)
    assert lines[-2:] == ["  first line", "  what went wrong"] and str(tmp_path / "logs" / "failing.log") in str(error.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_stage_without_its_result_is_a_failure(tmp_path):
    with pytest.raises(StageFailed, match="stage idle ended without its result"):
        run(tmp_path, Stage("idle", (sys.executable, "-c", ""), lambda: False))


def test_interruption_stops_every_process_even_one_that_ignores_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(stages, "STATUS_SECONDS", 0.5)
    deaf = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )

    def interrupt(line: str) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        while time.monotonic() - begin < 60:
            run_stages([stage(tmp_path, "deaf", deaf)], 1, tmp_path / "logs", tmp_path, dict(os.environ), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
