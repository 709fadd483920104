"""OUT appears complete or not at all: with a full disk, after a kill or an interrupt, and if something already lies there."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from refine_titan.conversion import output_folder
from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.errors import UserError
from refine_titan.files import reasons
from refine_titan.models import FAMILIES
from tests.checkpoints import TOOL, assert_nothing_left, assert_same_bits, random_weights, read_hf_folder, write_hf_folder

ARGS = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, vocab_size=8)
# Runs the command line after a line of Python that breaks something.
BREAKING = "import sys, os, signal, resource, runpy; sys.argv = sys.argv[1:]; {fault}; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def hf(tmp_path):
    return write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))


@pytest.fixture
def checkpoint(hf, tmp_path):
    from_hf(hf, tmp_path / "dcp")
    return tmp_path / "dcp"


def convert_with(fault: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BREAKING.format(fault=fault), str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def signalled(reader: str, number: str) -> str:
    """Python code that sends the process a signal when it reads its fifth tensor."""
    module, name = reader.rsplit(".", 1)
    return (
        # A shell's background job inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"import refine_titan; from {module} import {name}; original, calls = {name}.read, []; "
        f"{name}.read = lambda self, tensor: (calls.append(1), len(calls) == 5 and os.kill(os.getpid(), signal.{number}), "
        "original(self, tensor))[-1]"
    )


COMMANDS = [
    ("from-hf", "hf", "refine_titan.models.hf_weights.HFWeights"),
    ("to-hf", "dcp", "refine_titan.conversion.dcp_weights.DCPWeights"),
]


@pytest.mark.parametrize("command, source, reader", COMMANDS)
def test_file_system_that_refuses_to_write_is_named(checkpoint, tmp_path, command, source, reader):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))"
    result = convert_with(limit, command, tmp_path / source, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path / 'out'} cannot be written: File too large\n"
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("command, source, reader", COMMANDS)
def test_killed_conversion_leaves_no_output_and_the_next_one_cleans_up(checkpoint, tmp_path, command, source, reader):
    result = convert_with(signalled(reader, "SIGKILL"), command, tmp_path / source, tmp_path / "out")
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.partial"))
    {"from-hf": from_hf, "to-hf": to_hf}[command](tmp_path / source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and not list(tmp_path.glob(".out.*.partial"))


@pytest.mark.parametrize("command, source, reader", COMMANDS)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, command, source, reader, number):
    result = convert_with(signalled(reader, number), command, tmp_path / source, tmp_path / "out")
    assert result.returncode == 130 and result.stderr == "Interrupted; nothing was written.\n"
    assert_nothing_left(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("convert, source", [(from_hf, "hf"), (to_hf, "dcp")])
def test_full_disk(checkpoint, tmp_path, small_disk, monkeypatch, convert, source):
    with pytest.raises(UserError, match=r"out needs about [\d,]+ bytes; .*disk has [\d,]+ bytes free"):
        convert(tmp_path / source, small_disk / "out")
    # The disk fills up after the check.
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
    monkeypatch.setattr(reasons.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        convert(tmp_path / source, small_disk / "out")
    assert_nothing_left(small_disk / "out")


@pytest.mark.parametrize("convert, source", [(from_hf, "hf"), (to_hf, "dcp")])
def test_only_an_empty_folder_is_taken(checkpoint, tmp_path, convert, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UserError, match="out exists and is not an empty folder"):
        convert(tmp_path / source, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    convert(tmp_path / source, out)
    assert (out / "config.json").is_file()
    with pytest.raises(UserError, match="file exists and is not an empty folder"):
        (tmp_path / "file").write_text("")
        convert(tmp_path / source, tmp_path / "file")
    with pytest.raises(UserError, match="inside cannot be written: .*file is not a folder"):
        convert(tmp_path / source, tmp_path / "file" / "inside")


def test_folders_made_on_the_way_go_with_a_failed_conversion(hf, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(output_folder, "sync", fail)
    with pytest.raises(UserError, match="out cannot be written: Input/output error"):
        from_hf(hf, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


def test_unfinished_output_of_a_running_process_is_left_alone(hf, tmp_path):
    running = tmp_path / f".out.{os.getppid()}.partial"
    running.mkdir()
    from_hf(hf, tmp_path / "out")
    assert running.is_dir() and (tmp_path / "out").is_dir()


def test_files_are_as_readable_as_the_users_others(checkpoint, tmp_path):
    to_hf(checkpoint, tmp_path / "out", max_shard_bytes=100_000)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    (tmp_path / "other").write_text("")
    assert modes == {(tmp_path / "other").stat().st_mode}
    assert_same_bits(read_hf_folder(tmp_path / "out"), random_weights(ARGS, torch.float32))
