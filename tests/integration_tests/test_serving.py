"""README's command serves the export of a run on bytes: its folder holds all that vLLM and AutoTokenizer need."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from transformers import AutoTokenizer

from tests.checkpoints import convert
from tests.integration_tests.runs import REPOSITORY, assert_finished, train

START_SECONDS = 400


def ask(port: int, path: str, **body) -> dict:
    """The server's answer; raises URLError while it does not listen."""
    data = json.dumps(body).encode() if body else None
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read() or b"{}")


def readme_command(folder: Path) -> list[str]:
    """The command of README.md for a folder."""
    [line] = [part for part in (REPOSITORY / "README.md").read_text().split("`") if part.startswith(".venv/bin/python -m vllm.")]
    program, *arguments = line.split()
    assert program == ".venv/bin/python"
    return [sys.executable, *(str(folder) if argument == "HF_OUT" else argument for argument in arguments)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.mark.slow
def test_readme_command_serves_the_debug_run(tmp_path):
    debug = REPOSITORY / "train_configs" / "debug_midtrain.toml"
    assert_finished(train(tmp_path / "run", "--training.steps", "2", config=debug))
    exported = tmp_path / "exported"
    converted = convert("to-hf", tmp_path / "run" / "checkpoint" / "step-2", exported)
    assert converted.returncode == 0 and not converted.stderr, converted.stderr
    port = free_port()
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}
    with (tmp_path / "log").open("w") as log:
        command = [*readme_command(exported), "--port", str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-6000:]
                try:
                    ask(port, "/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(1)
            prompt = "def größe():\n"
            answer = ask(port, "/v1/completions", model=str(exported), prompt=prompt, max_tokens=8, temperature=0, logprobs=1)
            tokens = ask(port, "/tokenize", model=str(exported), prompt=prompt)["tokens"]
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=60)
    assert tokens == list(prompt.encode("utf-8")) == AutoTokenizer.from_pretrained(exported).encode(prompt)
    assert answer["usage"]["prompt_tokens"] == len(prompt.encode("utf-8")) and 1 <= answer["usage"]["completion_tokens"] <= 8
