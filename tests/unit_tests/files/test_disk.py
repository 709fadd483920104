"""Files that appear whole or not at all, files that grow by whole pieces, and what users read about disks."""

import errno
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.reasons import in_words, is_about_a_file, naming, reason, system_error
from refine_titan.files.whole_files import new_file, parts_of, remove_half_written, write_atomically
from refine_titan.report.output import write_output


@contextmanager
def files_of_at_most(nbytes: int):
    """Inside the context the system refuses what would make a file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_piece_that_does_not_fit_waits_and_leaves_no_part(tmp_path, caplog):
    file = AppendedFile(tmp_path / "lines")
    file.append(b"first\n")
    with files_of_at_most(8):
        file.append(b"second\n")
        file.append(b"third\n")
        assert (tmp_path / "lines").read_bytes() == b"first\n" and file.waiting == 2
        assert file.problem.errno == errno.EFBIG and file.problem.filename == str(tmp_path / "lines")
    file.append(b"fourth\n")
    assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert file.problem is None and file.waiting == 0
    assert [record.getMessage() for record in caplog.records if "what belongs into it waits" in record.getMessage()] == [
        f"{tmp_path / 'lines'} cannot be written (File too large): what belongs into it waits"
    ]
    file.close()


def test_file_that_cannot_be_written_keeps_its_old_content_and_is_named(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large") as caught:
        write_atomically(path, "new" * 100)
    assert caught.value.filename == str(path) and path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_folder_that_is_gone_is_named_by_the_file(tmp_path):
    with pytest.raises(OSError) as caught, new_file(tmp_path / "gone" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "gone" / "file")


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".metrics.jsonl.123.tmp").write_text("half")
    (tmp_path / "notes.tmp").write_text("mine")
    remove_half_written(tmp_path)
    assert os.listdir(tmp_path) == ["notes.tmp"]


def test_error_behind_an_error_is_found():
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904  torch keeps the cause as context
    except RuntimeError as error:
        assert system_error(error).errno == errno.ENOSPC
    assert system_error(RuntimeError("I/O error: No space left on device (os error 28)")).errno == errno.ENOSPC
    assert system_error(RuntimeError("a bug")) is None and not is_about_a_file(RuntimeError("a bug"))


def test_copy_that_fails_is_named_by_the_side_that_failed(tmp_path):
    (tmp_path / "source").write_bytes(bytes(1000))
    with files_of_at_most(10), pytest.raises(OSError) as caught, naming(tmp_path / "source"):
        shutil.copyfile(tmp_path / "source", tmp_path / "target")
    assert caught.value.filename == str(tmp_path / "target")
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        shutil.copyfile(tmp_path / "nowhere", tmp_path / "target")
    assert caught.value.filename == str(tmp_path / "nowhere")


def test_full_disk_says_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    text = reason(OSError(errno.ENOSPC, ""), tmp_path / "not" / "there" / "yet")
    found = int(text.removeprefix("No space left on device (").removesuffix(" bytes are free)").replace(",", ""))
    assert abs(found - free) < 1 << 30  # others write at the same time
    assert in_words(OSError(errno.EIO, "", str(tmp_path))) == f"{tmp_path}: Input/output error"


def fail(*_) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_piece_that_cannot_be_brought_to_disk_is_not_in_the_file(tmp_path, monkeypatch):
    file = AppendedFile(tmp_path / "lines")
    file.append_to_disk(b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="lines"):
            file.append_to_disk(b"two\n")
    assert (tmp_path / "lines").read_bytes() == b"one\n"
    file.append_to_disk(b"three\n")
    assert (tmp_path / "lines").read_bytes() == b"one\nthree\n"


def test_file_that_becomes_shorter_while_it_is_copied(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 10)
    assert list(parts_of(path, [(0, 3), (5, 10)])) == [b"xxx", b"xxxxx"]
    with pytest.raises(OSError, match="has become shorter"):
        write_atomically(path, parts_of(path, [(0, 11)]))
    assert path.read_bytes() == b"x" * 10 and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    """That of a process that lives stays, and so do other files."""
    done = subprocess.Popen(["true"])
    done.wait()
    left, *others = [tmp_path / f".page.html.{name}.tmp" for name in (done.pid, os.getppid(), "x", f"1.{done.pid}")]
    others += [tmp_path / f".other.html.{done.pid}.tmp"]
    for path in (left, *others):
        path.write_text("half")
    write_output(tmp_path / "page.html", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "page.html"])
