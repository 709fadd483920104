"""Locks where the file system has them, and a line instead of an end where it has none."""

import errno
import fcntl
import os

import pytest

from refine_titan.errors import UserError
from refine_titan.files.locks import NO_LOCKS, take_lock
from refine_titan.monitoring.run_folder import FolderLock


def test_second_holder_is_refused(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} is already training in"):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("code", NO_LOCKS)
def test_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    assert "is on a file system without locks: nothing keeps a second process from training in it" in caplog.text
    lock.release()


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError):
        take_lock(file)
