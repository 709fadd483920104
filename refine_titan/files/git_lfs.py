"""Recognises the pointers that Git LFS leaves where it has not downloaded a file."""

from pathlib import Path

from refine_titan.errors import UserError

# The beginning of every pointer.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError if Git LFS has left a pointer where a file should be."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file: run git lfs pull")
