"""What a rank and its node's launcher (`launch.py`) tell each other; without that launcher, nothing.

They share a folder of the node, which the launcher names in the environment. The launcher writes there that the run is to stop,
a rank that it has stopped. Errors go through torchelastic's own error file.
"""

import ctypes
import os
import signal
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

FOLDER_VARIABLE = "REFINE_TITAN_LAUNCH_FOLDER"
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def is_launched() -> bool:
    return FOLDER_VARIABLE in os.environ


def stop_file() -> Path:
    """Exists once the launcher has been asked to stop, and holds the signal's number."""
    return Path(os.environ[FOLDER_VARIABLE], "stop")


def stopped_file() -> Path:
    """Exists once a rank has stopped on request."""
    return Path(os.environ[FOLDER_VARIABLE], "stopped")


def end_with_launcher() -> None:
    """Lets the system kill this rank if its launcher dies without ending it, e.g. by SIGKILL (Linux)."""
    if is_launched():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_error_to_launcher(error: Exception) -> bool:
    """Hands an error over, to be printed once and with the rank's name; False without a launcher."""
    if is_launched():
        get_error_handler().record_exception(error)
    return is_launched()
