"""`tools/gpu_acceptance.py` on a CPU: it runs parts to their end, kills and goes on, and says what failed and what was left out."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.integration_tests.runs import REPOSITORY
from tools.timed_parts import Check, Command, Part, Report, run_part


def accept(folder, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/gpu_acceptance.py", "--output", str(folder), *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    report = folder / "report.json"
    return result, json.loads(report.read_text()) if report.exists() else {}


def test_step_is_measured_and_the_next_part_is_killed_at_its_limit(tmp_path):
    result, report = accept(tmp_path / "out", "--small", "--parts", "step,step-lact,profile", "--limit", "step-lact=0.5")
    assert result.returncode == 1, result.stderr[-2000:]
    parts = report["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "left out") | {
        "step": "passed",
        "step-lact": "over its limit",
    }
    figures = parts["step"]["figures"]["benchmark_step"]
    assert figures["time_ratio"] > 0 and figures["ntp_tokens_per_second"] > 0 and figures["decoded_tokens_per_second"] > 0
    assert figures["stages"]["rollout"] > 0 and figures["ntp_mfu"] is None
    assert parts["step-lact"]["seconds"] < 5 and parts["step-lact"]["figures"] == {}
    assert "GPU" in parts["profile"]["reason"] and parts["native"]["reason"] == "not named by --parts"
    assert report["hardware"]["gpu"] is None and report["sizes"] == "debug" and report["versions"]["packages"]["torch"]
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| step |" in table and "over its limit" in table


@pytest.mark.slow
def test_every_part_that_runs_without_a_gpu_ends(tmp_path, oracles):
    limits = [word for name in ("parity", "native", "lact-vllm", "vllm", "step-vllm") for word in ("--limit", f"{name}=600")]
    result, report = accept(tmp_path / "out", "--small", "--oracles", str(oracles), "--minutes", "30", *limits)
    assert result.returncode == 0, result.stdout
    assert {name for name, part in report["parts"].items() if part["status"] == "left out"} == {"step-fla", "profile"}


@pytest.mark.slow
def test_unknown_part_is_refused(tmp_path):
    result, report = accept(tmp_path / "out", "--small", "--parts", "speed")
    assert result.returncode == 2 and "--parts has speed; allowed: parity, native" in result.stderr and not report


def printing(name: str, text: str, check: Check | None = None, status: int = 0) -> Command:
    def read(finished):
        return {"read": json.loads(finished.output)}, [check] if check else []

    return Command(name, [sys.executable, "-c", f"print({text!r}); raise SystemExit({status})"], read)


def sleeping() -> Command:
    """Starts a process of its own that outlives its parent unless the group is killed."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    return Command("sleep", [sys.executable, "-c", child], lambda finished: ({}, []))


def test_parts_pass_fail_are_killed_and_are_left_out(tmp_path):
    parts = [
        Part("good", "", 60, [printing("a", "1"), printing("b", "2")], at_once=2),
        Part("unjudged", "", 60, [printing("a", "1", Check("gap", 3.0, "at most 1", None))]),
        Part("wrong", "", 60, [printing("a", "1", Check("gap", 3.0, "at most 1", False))]),
        Part("crashed", "", 60, [printing("a", "said before", status=3), printing("b", "2")]),
        Part("unreadable", "", 60, [printing("a", "no JSON")]),
        Part("slow", "", 0.3, [printing("a", "1"), sleeping()], at_once=2),
        Part("unfit", "", 60, [printing("a", "1")], left_out="needs a GPU"),
    ]
    report = Report(tmp_path, {"command": "test"}, parts)
    assert {part["status"] for part in json.loads((tmp_path / "report.json").read_text())["parts"].values()} == {"not begun"}
    begin = time.monotonic()
    for part in parts:
        report.set(part.name, run_part(part, 100, tmp_path, dict(os.environ)))
    assert time.monotonic() - begin < 30
    found = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "good": "passed",
        "unjudged": "passed",
        "wrong": "failed",
        "crashed": "failed",
        "unreadable": "failed",
        "slow": "over its limit",
        "unfit": "left out",
    }
    assert found["good"]["figures"] == {"a": {"read": 1}, "b": {"read": 2}}
    assert found["wrong"]["reason"] == "gap is 3.0; allowed: at most 1"
    assert "exit status 3: said before" in found["crashed"]["reason"] and found["crashed"]["figures"] == {"b": {"read": 2}}
    assert "sleep" in found["slow"]["reason"]
    assert report.has_failed and "1 values not checked" in (tmp_path / "report.md").read_text()
    assert run_part(parts[0], 0, tmp_path, dict(os.environ)).status == "left out"
