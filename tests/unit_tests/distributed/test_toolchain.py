import sysconfig

import pytest
import torch

from refine_titan.distributed.toolchain import check_compiler
from refine_titan.errors import UserError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, gcc and Python's headers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    return tmp_path


def test_machine_with_compiler_and_headers_is_accepted(machine):
    check_compiler()


@pytest.mark.parametrize(
    "missing, compiler, message",
    [
        ("gcc", "", "neither gcc nor clang in PATH, nor CC"),
        ("gcc", "icx", "CC is 'icx', which is not a command"),
        ("Python.h", "", "Python.h is missing"),
    ],
)
def test_machine_on_which_triton_cannot_compile_is_refused(machine, monkeypatch, missing, compiler, message):
    (machine / missing).unlink()
    if compiler:
        monkeypatch.setenv("CC", compiler)
    with pytest.raises(UserError, match=message):
        check_compiler()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_compiler()
