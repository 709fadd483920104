"""Paths that users write."""

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """A path in which `~` is the home folder, also where no shell has replaced it (`--output=~/x`, and in TOML files)."""
    return Path(os.path.expanduser(text))
