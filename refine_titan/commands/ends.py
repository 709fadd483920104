"""How a command ends: one line for what a user can mend, and the exit status."""

import os
import sys
import traceback
from collections.abc import Callable

from refine_titan.distributed.launched_rank import leave_error_to_launcher
from refine_titan.errors import ExtensionError, RunFailure, UsageError, UserError, printable
from refine_titan.files.reasons import in_words, is_about_a_file
from refine_titan.terminal import INTERRUPTED, raise_when_interrupted, show

FAILED, USAGE = 1, 2


def run_to_end(work: Callable[[], int], interrupted: Callable[[], str], kept: Callable[[], str] = str) -> int:
    """Carries out a command, and returns the exit status.

    Args:
        work: the command; returns the status if nothing is wrong.
        interrupted: what to say after Ctrl-C, or a signal that raises KeyboardInterrupt with a `status` of its own.
        kept: the end of a message about a disk or a worker that failed: what is left of the output.

    Errors that are a fault of this program go on as they are, with their traceback, but for those of a rank, which its launcher shows.
    """
    raise_when_interrupted()
    try:
        return work()
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt as interrupt:
        show(printable(interrupted()), sys.stderr)
        return getattr(interrupt, "status", INTERRUPTED)
    except Exception as error:
        if is_about_a_file(error):
            error = UserError(f"{in_words(error)}{kept()}")
        elif isinstance(error, RunFailure):
            error.args = (f"{error}{kept()}", *error.args[1:])
        told = isinstance(error, (UserError, RunFailure))
        if told and isinstance(error, (RunFailure, ExtensionError)) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        if not leave_error_to_launcher(error):
            if not told:
                raise
            show(f"error: {printable(error)}", sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
