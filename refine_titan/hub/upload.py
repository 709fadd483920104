"""Pushes an exported model to the Hugging Face Hub, in one commit: whoever downloads it never sees a part of it."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_JSON_MIB
from refine_titan.hub.cache import Wanted, explained
from refine_titan.hub.names import HubName, parse_name
from refine_titan.models.hf_files import ASSETS
from refine_titan.models.hf_weights import is_weights_file

# torchtitan's logger too.
logger = logging.getLogger()

CARD_FILE = "README.md"
# In every card that is made here: one without it was written by somebody, and stays.
CARD_MARK = "<!-- made by refine_titan -->"


class Destination:
    """A repository to push to.

    Attributes:
        name: `owner/name`.
    """

    def __init__(self, text: str, setting: str = "--push"):
        """Checks, before anything is converted, that there is somebody to push as.

        Raises:
            UserError: it is no name, nobody is logged in, or the Hub cannot be reached.
        """
        name = parse_name(text)
        if name is None or name.revision is not None:
            raise UserError(f"{setting} is {text!r}; allowed: owner/name of a repository of the Hugging Face Hub")
        self.name = name.repository
        self._wanted = Wanted(setting, HubName(self.name))
        with self._explained():
            from huggingface_hub import HfApi

            self._api = HfApi()
            self._api.whoami()

    def push(self, folder: Path, card: str, private: bool, message: str) -> str:
        """Pushes the files of an export and its card; makes the repository if there is none.

        Weights and tokenizer of an earlier export are replaced: files that this one lacks go in the same commit. Whatever else is there,
        and a card that was not made here, stays as it is.

        Args:
            private: whether a repository that is made is private.

        Returns:
            Where the model is.

        Raises:
            UserError: the Hub does not take it.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._explained():
            self._api.create_repo(self.name, private=private, exist_ok=True)
            files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CARD_FILE}
            operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            leftovers = _leftovers(self._api.list_repo_files(self.name), files)
            if leftovers:
                logger.warning(f"{self.name} loses the files of an earlier export that this one lacks: {', '.join(leftovers)}")
                operations += [CommitOperationDelete(name) for name in leftovers]
            if self._has_own_card():
                logger.warning(f"{self.name} has a {CARD_FILE} that somebody has written: it stays as it is")
            else:
                operations.append(CommitOperationAdd(CARD_FILE, card.encode("utf-8")))
            self._api.create_commit(self.name, operations, commit_message=message)
            return f"{self._api.endpoint}/{self.name}"

    def _has_own_card(self) -> bool:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            card = Path(self._api.hf_hub_download(self.name, CARD_FILE))
        except EntryNotFoundError:
            return False
        with card.open("rb") as file:
            return CARD_MARK.encode() not in file.read(MAX_JSON_MIB.nbytes)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        try:
            with explained(self._wanted):
                yield
        except LocalTokenNotFoundError as error:
            raise UserError(f"{self._wanted.setting} is {self.name!r}, but nobody is logged in: {log_in}") from error
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
                place = self._api.endpoint
                raise UserError(
                    f"{self._wanted.setting} is {self.name!r}: {place} refuses ({cause.response.status_code}) to let this token write "
                    f"there; {log_in}"
                ) from error
            raise


def _leftovers(there: Iterable[str], pushed: Iterable[str]) -> list[str]:
    """Files that an earlier export may have left in a repository, and that would be read beside or in place of the pushed ones."""
    return sorted(name for name in set(there) - set(pushed) if is_weights_file(name) or name in ASSETS)
