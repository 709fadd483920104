"""Writes the files that an evaluation makes for a reader."""

from pathlib import Path

from refine_titan.errors import UserError
from refine_titan.files.reasons import reason
from refine_titan.files.whole_files import remove_abandoned, write_atomically


def write_output(path: Path, text: str) -> None:
    """Writes a file completely or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    try:
        remove_abandoned(path)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error, path)}") from error
