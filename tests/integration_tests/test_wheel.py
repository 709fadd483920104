"""The wheel, installed into an environment of its own: every command runs from it, in a folder that has nothing of the repository."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refine_titan.commands.main import COMMANDS
from tests.integration_tests.runs import REPOSITORY, TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def command(folder) -> Path:
    """The installed `refine-titan`. The dependencies are those of the environment of the tests, without its editable refine_titan."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "tests")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", source]
    subprocess.run(build, check=True, timeout=300)
    shutil.rmtree(source)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    site = next((environment / "lib").iterdir()) / "site-packages"
    # A path in a .pth file is added as it is: the .pth file there that leads to this repository is not read.
    (site / "dependencies.pth").write_text(str(Path(importlib.metadata.distribution("torch").locate_file(""))))
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [
        *pip,
        "--python",
        environment / "bin" / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        wheel,
    ]
    subprocess.run(install, check=True, timeout=300)
    return environment / "bin" / "refine-titan"


@pytest.fixture
def run(command, folder, monkeypatch):
    """Runs the command in an empty folder, with nothing of this repository on Python's path."""
    (folder / "work").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}

    def call(*arguments) -> str:
        words = [str(command), *map(str, arguments)]
        result = subprocess.run(words, cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    return call


def test_package_is_that_of_the_wheel(command, folder):
    script = "import refine_titan, refine_kernels; print(refine_titan.__file__, refine_kernels.__file__)"
    found = subprocess.run([command.with_name("python"), "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    assert all(path.startswith(str(folder / "environment")) for path in found.stdout.split())


def test_every_command_has_its_help(run):
    assert all(name in run("--help") for name in COMMANDS)
    for name in COMMANDS:
        assert f"refine-titan {name}" in run(name, "--help")


def test_every_command_runs(run, folder):
    work = folder / "work"
    shutil.copy(TINY, work / "tiny.toml")
    (work / "books").mkdir()
    (work / "books" / "a.txt").write_text("A line of a book.\n" * 2000)
    run("prepare", "run", "--input", "books", "--tokenizer", "bytes", "--output", "shards", "--workers", 1)
    assert "documents: 1" in run("prepare", "show", "shards")
    settings = ("--data.source", "shards", "--job.dump_folder", "run")
    assert "computed, not measured" in run("estimate", "tiny.toml", "--device", "cpu", *settings)
    assert "run folder: run" in run("train", "tiny.toml", "--dry-run", *settings)
    run("train", "tiny.toml", "--training.steps", 2, *settings)
    step = work / "run" / "checkpoint" / "step-2"
    assert step.is_dir()
    run("convert", "to-hf", step, "hf")
    assert "model" in run("convert", "inspect", "hf")
    tasks = ("--tasks", "perplexity", "--evaluation.perplexity_source", "books", "--evaluation.perplexity_tokens", 256)
    for name in ("a", "b"):
        run("evaluate", "run", "tiny.toml", "--checkpoint", step, "--output", name, "--num-samples", 2, *tasks, *settings)
    assert "report.html" in run("report", "a")
    assert run("report", "run").strip() == "run/report.html"
    assert "perplexity" in run("compare", "a", "b")


def test_experiments_have_to_be_named_where_there_are_none(command, folder):
    result = subprocess.run([command, "reproduce"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.startswith("error: EXPERIMENT is missing") and result.stderr.count("\n") == 1
