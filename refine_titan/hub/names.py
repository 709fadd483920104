"""Names of repositories of the Hugging Face Hub, `owner/name` or `owner/name@revision`, and the folders of the cache that hold them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

# What the Hub allows, with the owner, which names of early models lack.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9._/-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# `data/books.jsonl` is a path that is wrong, not a repository.
_FILE = re.compile(r"\.(txt|md|rst|py|csv|json|jsonl|parquet|arrow|toml|safetensors|gz|zst)$", re.IGNORECASE)
_SNAPSHOT = re.compile(rf"(?:model|dataset)s--([^/]+?)--([^/]+)/snapshots/({_COMMIT.pattern})/?$")

# Settings whose value may be a name; `data.source` and `evaluation.perplexity_source` name data sets.
SETTINGS = (
    ("model", "flavor"),
    ("model", "hf_assets_path"),
    ("checkpoint", "initial_load_path"),
    ("data", "source"),
    ("evaluation", "perplexity_source"),
)


class HubName(NamedTuple):
    """A repository, `owner/name`, and a branch, tag or commit of it; None for its default branch."""

    repository: str
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def short(self) -> str:
        """A name for a folder: `owner--name-0123abcd`."""
        return "-".join([self.repository.replace("/", "--"), *([] if self.revision is None else [self.revision[:8]])])

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_name(text: str) -> HubName | None:
    """The name that a text is; None if no repository can have it, or if it ends like a file."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or _FILE.search(found[1]):
        return None
    return HubName(found[1], found[2])


def hub_name(text: str | Path | None) -> HubName | None:
    """The repository that a value names. None if it is a path: one that exists, or one that is no name."""
    text = str(text or "")
    return None if Path(text).exists() else parse_name(text)


def name_of_folder(folder: str | Path) -> HubName | None:
    """The repository and commit that a folder of Hugging Face's cache holds; None for any other folder."""
    found = _SNAPSHOT.search(str(folder))
    return None if found is None else HubName(f"{found[1]}/{found[2]}", found[3])


def with_names(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by section, with `owner/name@commit` in place of folders of the cache, elsewhere on other machines."""
    settings = {name: dict(values) if isinstance(values, dict) else values for name, values in settings.items()}
    for section, name in SETTINGS:
        value = settings.get(section, {}).get(name)
        if isinstance(value, str) and (found := name_of_folder(value)) is not None:
            settings[section][name] = str(found)
    return settings
