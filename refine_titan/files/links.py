"""Whose content a link of a folder may stand for: files of strangers are copied, and a link may point at any file of the user's."""

from pathlib import Path

from refine_titan.errors import UserError


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a path of a folder is a file elsewhere: it, or a folder on the way to it, is a link.

    The links of Hugging Face's cache, from `snapshots` to the `blobs` beside it, count as inside.
    """
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return False
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    return snapshots is None or not real.is_relative_to(snapshots.parent / "blobs")


def refuse_link(path: Path) -> None:
    """Raises UserError if a file that is to be copied is a link out of its folder."""
    if leads_outside(path, path.parent):
        raise UserError(
            f"{path} is a link to {path.resolve()}, outside its folder; allowed: files, and the links of Hugging Face's cache. Copy the "
            "file there if its content may be copied on"
        )
