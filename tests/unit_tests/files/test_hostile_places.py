"""Places where people keep files: network file systems whose renames fail once, folders that may not be written, files of others."""

import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from refine_titan.conversion.dcp_checksums import ChecksumWriter
from refine_titan.conversion.dcp_metadata import CheckedReader
from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.data.data_files import list_folder
from refine_titan.errors import UserError
from refine_titan.evaluation.sample_log import SampleLog
from refine_titan.files import renaming
from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.renaming import rename
from refine_titan.files.whole_files import write_atomically
from refine_titan.models import FAMILIES
from refine_titan.monitoring.run_folder import FolderLock, check_writable
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from tests.checkpoints import random_weights, write_hf_folder
from tests.unit_tests.data.test_data import job, loader, write_jsonl

ARGS = FAMILIES["delta_net"].flavors["debug"]


@contextmanager
def renames_that_fail(monkeypatch, number: int, times: int = 1, is_done: bool = False):
    """Inside the context each file's or folder's first `times` renames fail, after they are carried out or instead."""
    replace, calls = os.replace, {}
    monkeypatch.setattr(renaming, "WAITS", (0.0, 0.0, 0.0))

    def failing(source, target, **options):
        calls[str(source)] = calls.get(str(source), 0) + 1
        if calls[str(source)] > times:
            return replace(source, target, **options)
        if is_done:
            replace(source, target, **options)
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        yield calls


# What a network file system may answer to a rename, and whether it carried it out.
ONCE = [(errno.ESTALE, False), (errno.EIO, False), (errno.EBUSY, False), (errno.ENOENT, True), (errno.EIO, True), (errno.ESTALE, True)]


@pytest.mark.parametrize("number, is_done", ONCE)
def test_rename_that_fails_once_has_worked(tmp_path, monkeypatch, number, is_done):
    """In every place that renames: small files, a checkpoint, conversions, prepared data."""
    hf = write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))
    write_jsonl(tmp_path / "a.jsonl")
    with renames_that_fail(monkeypatch, number, is_done=is_done) as calls:
        for content in ("old", "new"):
            write_atomically(tmp_path / "config.json", content)
        dcp.save({"a": torch.ones(3)}, storage_writer=ChecksumWriter(tmp_path / "step-1"))
        from_hf(hf, tmp_path / "dcp")
        to_hf(tmp_path / "dcp", tmp_path / "back")
        prepare([tmp_path / "a.jsonl"], "", tmp_path / "prepared", Settings(min_tokens=1))
    assert len(calls) >= 6  # every place did meet the fault
    assert (tmp_path / "config.json").read_text() == "new"
    assert len(CheckedReader(tmp_path / "step-1").read_metadata().state_dict_metadata) == 1
    assert (tmp_path / "back" / "model.safetensors").is_file() and json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    left = [path.name for path in tmp_path.iterdir() if "partial" in path.name or path.name.endswith(".tmp")]
    assert left == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC, errno.EACCES])
def test_rename_that_always_fails_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch, number):
    write_atomically(tmp_path / "config.json", "old")
    with renames_that_fail(monkeypatch, number, times=99) as calls, pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "config.json", "new")
    assert caught.value.errno == number and (tmp_path / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
    assert list(calls.values()) == [4 if number == errno.ESTALE else 1]


def test_a_target_of_somebody_else_is_no_success(tmp_path, monkeypatch):
    """The source is gone, and what has the name is another file."""
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").write_text("other")

    def lose(source, target):
        os.unlink(source)
        raise FileNotFoundError(errno.ENOENT, "gone", str(source))

    monkeypatch.setattr(os, "replace", lose)
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("what", ["folder removed", "file removed", "folder moved"])
def test_lines_after_a_removal_go_into_a_new_file(tmp_path, caplog, what):
    folder = tmp_path / "run"
    folder.mkdir()
    file = AppendedFile(folder / "metrics.jsonl")
    file.append(b"1\n")
    match what:
        case "folder removed":
            shutil.rmtree(folder)
        case "file removed":
            (folder / "metrics.jsonl").unlink()
        case "folder moved":
            folder.rename(tmp_path / "elsewhere")
    file.append(b"2\n")
    file.append(b"3\n")
    file.close()
    assert (folder / "metrics.jsonl").read_bytes() == b"2\n3\n" and file.problem is None
    assert caplog.text.count("has been removed or moved while it was written") == 1
    if what == "folder moved":
        assert (tmp_path / "elsewhere" / "metrics.jsonl").read_bytes() == b"1\n"


def test_an_evaluation_whose_folder_disappears_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    log = SampleLog(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="it has been removed while it was written") as caught:
        log.append([{}])
    assert caught.value.filename == str(tmp_path / "run" / "samples.jsonl")
    log.close()


@pytest.fixture
def readable():
    """A folder that everybody may read and only its owner may write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def as_somebody_else():
    """Inside the context this process has not the rights of root, which may write everywhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else, whose folders these are not")
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_folders_that_may_not_be_written_are_named(readable):
    hf = write_hf_folder(readable / "hf", ARGS, random_weights(ARGS))
    for path in (hf, *hf.iterdir()):
        path.chmod(0o755)
    write_jsonl(readable / "a.jsonl")
    (readable / "a.jsonl").chmod(0o644)
    with as_somebody_else():
        with pytest.raises(UserError, match=f"job.dump_folder: {readable}/run cannot be written: {readable} is not a folder one can write"):
            check_writable(readable / "run")
        with pytest.raises(UserError, match=f"--output: {readable}/run cannot be written .Permission denied"):
            FolderLock(readable / "run", "--output", "evaluating")
        with pytest.raises(UserError, match=f"{readable}/dcp cannot be written: Permission denied"):
            from_hf(hf, readable / "dcp")
        with pytest.raises(UserError, match=f"--output cannot be written: {readable}/.out.partial: Permission denied"):
            prepare([readable / "a.jsonl"], "", readable / "out", Settings(min_tokens=1))
        with pytest.raises(PermissionError) as caught:
            write_atomically(readable / "config.json", "{}")
        assert caught.value.filename == str(readable / "config.json")
    assert sorted(path.name for path in readable.iterdir()) == ["a.jsonl", "hf"]


def test_files_that_may_not_be_read_are_named(readable):
    write_jsonl(readable / "a.jsonl")
    (readable / "closed").mkdir(mode=0o700)
    write_jsonl(readable / "closed" / "b.jsonl")
    (readable / "a.jsonl").chmod(0o600)
    with as_somebody_else():
        assert list_folder(readable, [".jsonl"]).left_out == {"cannot be read: Permission denied": ["closed"]}
        for source in (readable / "a.jsonl", readable):
            with pytest.raises(UserError, match=f"data.source: {readable}/a.jsonl cannot be read: Permission denied"):
                loader(job(source))


def test_data_that_lie_in_a_read_only_folder_are_read(readable):
    texts = write_jsonl(readable / "a.jsonl")
    (readable / "a.jsonl").chmod(0o444)
    with as_somebody_else():
        batch = loader(job(readable / "a.jsonl")).next_batch()
    assert bytes(batch.tokens_T[:70].tolist()).decode() == texts[0] and os.listdir(readable) == ["a.jsonl"]


@pytest.mark.parametrize("name", ["run", "run/deeper/still"])
def test_file_in_the_place_of_a_folder_is_named(tmp_path, name):
    """The system's own words are "File exists" and "Not a directory"."""
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=rf"job.dump_folder: .*cannot be written \({tmp_path}/run is a file; wanted is a folder\)"):
        FolderLock(tmp_path / name)
