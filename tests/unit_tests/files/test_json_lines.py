"""JSON lines are read one by one; damaged ones are skipped and said; a file of a long run needs little memory and time."""

import json
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from refine_titan.files import json_lines
from refine_titan.files.json_lines import DamagedLines, StepNumber, complete_lines, read_columns, read_records
from refine_titan.monitoring.run_folder import JsonLines

DAMAGE = [
    b"nonsense",
    b"",
    b"\0" * 300,
    b'{"step": 4, "loss": 1.0',
    b'{"step": 4, "lo{"step": 5, "loss": 1.0}',
    b'{"loss": 1.0}',
    b'{"step": "4"}',
    b'{"step": -4}',
    b'{"step": 4.5}',
    b'{"step": true}',
    b'{"step": 123456789012345678901234567890}',
    b'{"step": 4, "loss": "low"}',
    b'{"step": 4, "loss": [1.0]}',
    b'{"step": 4, "text": "\xff"',
    b"[4]",
    b"[" * 100_000,
    b'{"step": 4, "loss": 1e999}',
]


def line(step: int, **fields) -> bytes:
    return json.dumps({"step": step, **fields}).encode()


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_line_is_skipped_and_its_number_said(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1, loss=2.0), content, line(3, loss=None, text="\ud800"), b'{"step": 4, "loss": 1.0}'[:-3]]))
    damaged = DamagedLines(path)
    columns = read_columns(path, ["loss"], damaged)
    np.testing.assert_array_equal(columns["step"], [1, 3])
    np.testing.assert_array_equal(columns["loss"], [2.0, np.nan])
    assert str(damaged).startswith(f"{path}: line 2 is damaged and left out (line 2: ") and "\n" not in str(damaged)


def test_a_line_without_end_is_skipped_without_reading_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2, text="x" * (5 << 20)) + b"\n" + line(3) + b"\n" + b"y" * (5 << 20))
    damaged = DamagedLines(path)
    assert read_columns(path, [], damaged)["step"].tolist() == [1, 3]
    assert "line 2 is damaged and left out (line 2: longer than 1 MiB)" in str(damaged)
    content = path.read_bytes()
    assert [content[found.begin : found.end] for found in complete_lines(path)] == content.splitlines(keepends=True)[:3]


def test_half_surrogates_are_read_as_python_writes_them(tmp_path):
    class Text(msgspec.Struct):
        step: StepNumber
        text: str

    path, damaged = tmp_path / "rollouts.jsonl", DamagedLines(tmp_path / "rollouts.jsonl")
    path.write_bytes(line(1, text="a\ud800") + b"\n" + line(2, text="\U0001f600") + b"\n")
    assert [record.text for _, record in read_records(path, Text, damaged)] == ["a\ud800", "\U0001f600"] and not damaged


@pytest.mark.parametrize("content", DAMAGE[:11])
def test_resuming_skips_damaged_lines_and_drops_later_steps(tmp_path, caplog, content):
    path = tmp_path / "metrics.jsonl"
    kept = [line(1), content, line(2)]
    path.write_bytes(b"\n".join([*kept, line(3), content, line(4), b'{"step"']))
    file = JsonLines(path, last_step=2)
    assert file.last_step == 2
    file.write({"step": 3})
    file.close()
    assert path.read_bytes() == b"\n".join([*kept, line(3), b""])
    assert f"{path}: line 2 is damaged and left out" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_resuming_at_the_last_line_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = JsonLines(path, last_step=0)
    file.write({"step": 1})
    file.close()
    before = path.stat()
    JsonLines(path, last_step=1).close()
    assert (path.stat().st_ino, path.read_bytes()) == (before.st_ino, line(1) + b"\n")


LONG_RUN = """
import re, sys, time
from pathlib import Path
begin = time.perf_counter()
import refine_titan
folder = Path(sys.argv[2])
if sys.argv[1] == "resume":
    from refine_titan.monitoring.run_folder import JsonLines
    for name in ("metrics", "rollouts"):
        JsonLines(folder / f"{name}.jsonl", 199_000).close()
else:
    from refine_titan.report.training_sections import training_sections
    assert "10,000 of 100,000" in dict(training_sections(folder))["Rollouts"]
seconds = time.perf_counter() - begin
print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """200,000 steps of 27 numbers and 100,000 rollouts: 290 MB."""
    folder, rng = tmp_path_factory.mktemp("long"), random.Random(0)
    words = [f"word{i}" for i in range(1000)]
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(1, 200_001):
            names = (
                "refine/ntp_loss",
                "rollout/reward_mean",
                "rollout/match_mean",
                "grad_norm",
                *(f"another_metric_{i}" for i in range(23)),
            )
            file.write(line(step, **{name: rng.random() for name in names}) + b"\n")
    with (folder / "rollouts.jsonl").open("wb") as file:
        for index in range(100_000):
            prefix, tokens = " ".join(rng.choices(words, k=64)), rng.choices(range(150_000), k=5)
            texts = {"document": "x.parquet:17", "position": 397, "prefix_tail": prefix, "rollout": " a b", "truth": " c d"}
            file.write(
                line(2 * index + 1, **texts, rollout_tokens=tokens, truth_tokens=tokens, reward=rng.random(), advantage=None) + b"\n"
            )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", ["report", "resume"])
def test_long_run_is_read_below_300_mb_and_3_seconds(long_run, what):
    result = subprocess.run([sys.executable, "-c", LONG_RUN, what, long_run], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    seconds, kilobytes = map(float, result.stdout.split())
    assert kilobytes * 1024 < 300e6 and seconds < 3.0
