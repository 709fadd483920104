"""Fetches what a name of the Hub stands for into Hugging Face's cache, and says in one line why it cannot.

Of a repository only `config.json`, the tokenizer's files and safetensors are downloaded: no code, no pickled weights. What is in the cache
already is not asked for again, and with HF_HUB_OFFLINE=1 nothing is asked for.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_JSON_MIB
from refine_titan.files.reasons import naming, one_line
from refine_titan.hub.names import HubName
from refine_titan.models.hf_files import ASSETS
from refine_titan.models.hf_weights import INDEX_FILE, SINGLE_FILE, read_weight_map
from refine_titan.models.model_config import CONFIG_FILE

# Each is read whole, and may have at most MAX_JSON_MIB.
SMALL_FILES = (CONFIG_FILE, INDEX_FILE, *ASSETS)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Wanted:
    """What a setting wants of a repository.

    Attributes:
        setting: the setting or flag, for messages.
        name: the repository.
        kind: `model` or `dataset`.
        weights: whether the weights are wanted too.
    """

    setting: str
    name: HubName
    kind: Literal["model", "dataset"] = "model"
    weights: bool = False

    def at(self, commit: str) -> "Wanted":
        """The same at a commit."""
        return Wanted(self.setting, HubName(self.name.repository, commit), self.kind, self.weights)


def find_commit(wanted: Wanted) -> str:
    """The commit that a name stands for, as the Hub says, or, where it cannot be reached, as it said last.

    Raises:
        UserError: there is no such repository or revision, or nobody who could be asked.
    """
    if wanted.name.is_pinned:
        return wanted.name.revision
    from huggingface_hub import HfApi

    with explained(wanted):
        found = HfApi().resolve_revision(wanted.name.repository, repo_type=wanted.kind, revision=wanted.name.revision)
        return found.resolved


def fetch(wanted: Wanted) -> Path:
    """Downloads what is wanted of a model at a commit, unless the cache holds it; returns the folder of the cache.

    Args:
        wanted: its name has a commit (`find_commit`).

    Raises:
        UserError: it cannot be had, is larger than allowed, or has no weights that are read.
    """
    folder = _snapshot(wanted, SMALL_FILES, check_sizes=True)
    if wanted.weights:
        _require(folder / CONFIG_FILE, wanted)
        has_index = (folder / INDEX_FILE).is_file()
        shards = sorted(set(read_weight_map(folder / INDEX_FILE).values())) if has_index else [SINGLE_FILE]
        for shard in shards:
            if not shard.endswith(".safetensors"):
                raise UserError(f"{_asked(wanted)}: {INDEX_FILE} names {shard!r}; allowed: files that end in .safetensors")
        _snapshot(wanted, [*SMALL_FILES, *shards], check_sizes=False)
        for shard in shards:
            _require(folder / shard, wanted)
    return folder


def _snapshot(wanted: Wanted, files: list[str] | tuple[str, ...], check_sizes: bool) -> Path:
    """Downloads files of a model into the cache; those that the repository does not have are left out."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, commit = wanted.name.repository, wanted.name.revision
    with naming(constants.HF_HUB_CACHE), explained(wanted):  # a full disk, or a folder that cannot be written
        if check_sizes and not constants.is_offline_mode():
            for file in HfApi().list_repo_tree(repository, revision=commit) if not _is_cached(wanted) else ():
                size = getattr(file, "size", 0)  # a folder has none
                if file.path in SMALL_FILES and size > MAX_JSON_MIB.nbytes:
                    raise UserError(f"{_asked(wanted)}: {file.path} has {size:,} bytes; allowed: {MAX_JSON_MIB.words(' MiB')}")
        return Path(snapshot_download(repository, revision=commit, allow_patterns=[_literally(name) for name in files]))


def _is_cached(wanted: Wanted) -> bool:
    """Whether an earlier download has listed the repository's files at this commit, and checked their sizes."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(wanted.name.repository, revision=wanted.name.revision)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _literally(name: str) -> str:
    """A pattern that matches one file of the repository's top folder."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _require(path: Path, wanted: Wanted) -> None:
    """Raises UserError if the repository, or what the cache holds of it, lacks a file."""
    if path.is_file():
        return
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = [file.path for file in get_cached_repo_tree(wanted.name.repository, revision=wanted.name.revision)]
    except CachedRepoTreeNotFoundError:
        files = []
    if path.name in files or (not files and constants.is_offline_mode()):
        raise UserError(
            f"{_asked(wanted)}: the cache {constants.HF_HUB_CACHE} holds it without {path.name}; {_how_to_go_online(constants)}"
        )
    pickled = [name for name in files if name.endswith(PICKLED)]
    has = f"; it holds {pickled[0]}, but pickled weights are never read" if pickled else ""
    raise UserError(f"{_asked(wanted)}: the repository has no {path.name}{has}. Allowed: a model in safetensors with its {CONFIG_FILE}")


@contextmanager
def explained(wanted: Wanted) -> Iterator[None]:
    """Turns errors of the Hub's library into a UserError that says what was looked for, where, and what to do."""
    from huggingface_hub import constants, errors

    _be_quiet()
    place = constants.ENDPOINT
    thing = "data set" if wanted.kind == "dataset" else "model"
    revision = f" at the revision {wanted.name.revision!r}" if wanted.name.revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{_asked(wanted)}: {place} gives this {thing} only to those who have accepted its terms: accept them on its page, and log in "
            "with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{_asked(wanted)}: no such file or folder here, and {place} shows no {thing} of this name. Is the name right? A private one "
            "needs `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{_asked(wanted)}: {place} has this {thing}, but not{revision}; allowed: a branch, tag or commit of it") from error
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.is_offline_mode():
            problem = "is not to be asked (HF_HUB_OFFLINE is set)"
        else:
            problem = "cannot be reached"
        raise UserError(
            f"{_asked(wanted)}: no such file or folder here, no {thing} of this name{revision} in the cache {constants.HF_HUB_CACHE}, and "
            f"{place} {problem}; {_how_to_go_online(constants)}, or give a local path"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; does the token (`hf auth whoami`) allow it?" if status in (401, 403) else ""
        raise UserError(f"{_asked(wanted)}: {place} answers with {status} ({one_line(error)[:200]}){hint}") from error
    except errors.HTTPError as error:  # of the transport: no route, no name, a connection that ends
        raise UserError(f"{_asked(wanted)}: {place} cannot be reached: {one_line(error)[:200]}") from error


def _be_quiet() -> None:
    """Keeps the library from logging every request, and from drawing bars into files or once for every rank."""
    from huggingface_hub.utils import disable_progress_bars

    for client in ("httpx", "httpx2"):  # what the library calls, and its successor
        logging.getLogger(client).setLevel(logging.WARNING)
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        disable_progress_bars()


def _asked(wanted: Wanted) -> str:
    return f"{wanted.setting} is {str(wanted.name)!r}"


def _how_to_go_online(constants) -> str:
    return "unset HF_HUB_OFFLINE to download it" if constants.is_offline_mode() else "check the connection (or HF_ENDPOINT, a mirror)"
