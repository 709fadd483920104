"""Files that an evaluation writes for its reader."""

from pathlib import Path

from refine_titan.errors import UserError
from refine_titan.monitoring.run_folder import write_atomically


def write_output(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: if it cannot be written there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
