"""Keeps compiled kernels and their measured configurations from one run to the next.

A GPU kernel is compiled, and most of them timed in several configurations, when it is first used: minutes in the first step of a family.
Everything that keeps such results is told one folder here:

- Triton: compiled kernels, and with `TRITON_CACHE_AUTOTUNING` the chosen configurations (those of flash-linear-attention's kernels are
  kept in any case: its `FLA_CACHE_RESULTS` is on by default);
- torch's compiler: its graphs and code, which otherwise lie in the system's temporary folder;
- vLLM: its own compiled graphs.

Written for Triton 3.7.1, torch 2.13.0 and vLLM 0.32.0, which read these variables when they first need them.
"""

import os
import warnings
from pathlib import Path

FOLDER_VARIABLE = "REFINE_TITAN_CACHE"
FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "VLLM_CACHE_ROOT": "vllm"}
SWITCHES = {"TRITON_CACHE_AUTOTUNING": "1"}


def kernel_folder() -> Path:
    """The folder that `REFINE_TITAN_CACHE` names; by default `refine_titan` in the user's folder of caches."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "refine_titan")


def keep_compiled_kernels() -> None:
    """Names the folders in the environment of this process and its children; variables that are set already stay.

    If the folder cannot be written, it says so, and each package keeps to its own default.
    """
    folder = kernel_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        warnings.warn(f"{FOLDER_VARIABLE}: {folder} cannot be written; compiled kernels are kept where each package chooses", stacklevel=2)
        return
    for name, part in FOLDERS.items():
        os.environ.setdefault(name, str(folder / part))
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
