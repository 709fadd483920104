"""Checks that a machine with a GPU has what Triton (3.7.1) needs besides the driver, to compile a small extension that launches kernels."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from refine_titan.errors import UserError

COMPILERS = ("gcc", "clang")
HINT = "on Debian: apt install gcc python3-dev"


def check_compiler() -> None:
    """Checks that a machine with a GPU has a C compiler and Python's headers.

    Raises:
        UserError: one of them is missing; the message names it.
    """
    if not torch.cuda.is_available():
        return
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), "")
    if not shutil.which(compiler):
        found = f"CC is {compiler!r}, which is not a command" if compiler else f"there is neither {' nor '.join(COMPILERS)} in PATH, nor CC"
        raise UserError(f"{found}: Triton, which runs the kernels on a GPU, needs a C compiler ({HINT})")
    # Debian's Python has an installation scheme of its own, instead of which Triton uses this one.
    scheme = {"posix_local": "posix_prefix"}.get(sysconfig.get_default_scheme(), sysconfig.get_default_scheme())
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if not header.is_file():
        raise UserError(f"{header} is missing: Triton, which runs the kernels on a GPU, compiles against Python's headers ({HINT})")
