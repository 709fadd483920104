"""Writes a folder so that it appears complete or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from refine_titan.conversion.description import sync
from refine_titan.errors import UserError
from refine_titan.files.reasons import FULL, free_bytes, reason, system_error
from refine_titan.files.renaming import rename


@contextmanager
def new_folder(out: Path, nbytes: int, source: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out`. When the block ends, the folder is flushed to disk and renamed to `out`.

    If the block raises, the hidden folder is removed. If the process is killed, the next call with the same `out` removes it.

    Args:
        out: a path that does not exist, or an empty folder.
        nbytes: about how many bytes will be written.
        source: the folder that is read; `out` may not lie inside it.

    Raises:
        UserError: `out` exists and is not an empty folder, there is too little room, or writing fails.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} exists and is not an empty folder; give a path where nothing is")
    if out.is_relative_to(os.path.abspath(source)):
        raise UserError(f"{out} lies inside {source}, which is only read; give a path elsewhere")
    _remove_stale(out)
    _check_room(out, nbytes)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        rename(partial, out)
        sync(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        found = system_error(error)
        if found is None:
            raise
        source = found.filename
        if source is not None and Path(source).parent not in (partial, partial.parent) and Path(source) not in (partial, out.parent):
            raise UserError(f"{source} cannot be read: {reason(found, source)}") from error
        needs = f"; it needs about {nbytes:,} bytes" if found.errno in FULL else ""
        raise UserError(f"{out} cannot be written: {reason(found, out)}{needs}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not out.exists():
            for parent in made:
                parent.rmdir() if parent.is_dir() and not any(parent.iterdir()) else None


def _check_room(out: Path, nbytes: int) -> None:
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{out} cannot be written: {existing} is not a folder")
    free = free_bytes(existing)
    if free < nbytes:
        raise UserError(f"{out} needs about {nbytes:,} bytes; {existing} has {free:,} bytes free")


def _remove_stale(out: Path) -> None:
    """Removes what killed conversions to `out` have left. A folder with this process's own id stems from an earlier process."""
    for path in out.parent.glob(f".{_escape(out.name)}.*.partial"):
        number = path.name.removeprefix(f".{out.name}.").removesuffix(".partial")
        if number.isdecimal() and (int(number) == os.getpid() or not _is_running(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
