"""Communication between a rank and the launcher of its node (`launch.py`). Without the launcher nothing is exchanged.

They share a folder on the node, which the launcher names in the environment. The launcher writes a file there when the run is to stop;
a rank writes one when it has stopped. Errors go through torchelastic's own error file.
"""

import ctypes
import os
import signal
from pathlib import Path

FOLDER_VARIABLE = "REFINE_TITAN_LAUNCH_FOLDER"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl


def is_launched() -> bool:
    """Whether `launch.py` has started this process."""
    return FOLDER_VARIABLE in os.environ


def stop_file() -> Path:
    """A file that exists once the launcher has been asked to stop; it holds the number of the signal."""
    return Path(os.environ[FOLDER_VARIABLE], "stop")


def stopped_file() -> Path:
    """A file that exists once a rank has stopped on request."""
    return Path(os.environ[FOLDER_VARIABLE], "stopped")


def end_with_launcher() -> None:
    """Makes the system kill this rank if its launcher dies without ending it, by SIGKILL for example (Linux)."""
    if is_launched():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_error_to_launcher(error: Exception) -> bool:
    """Passes an error to the launcher, which prints it once and names the rank. Returns False if there is no launcher."""
    if is_launched():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # torch takes seconds to import

        # torch 2.13.0 writes the file where the launcher reads it, and the launcher, when another rank has ended, reads it half written.
        target = os.environ.get(ERROR_FILE_VARIABLE)
        if target is None:
            get_error_handler().record_exception(error)
            return True
        os.environ[ERROR_FILE_VARIABLE] = f"{target}.{os.getpid()}.tmp"
        try:
            get_error_handler().record_exception(error)
            os.replace(os.environ[ERROR_FILE_VARIABLE], target)
        finally:
            os.environ[ERROR_FILE_VARIABLE] = target
    return is_launched()
