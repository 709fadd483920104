"""Datasets of Hugging Face in local folders and on the Hub, read by the library `datasets` as a stream: rows are never all in memory.

A folder that `save_to_disk` wrote is recognised. `datasets:FOLDER` names a folder that `load_dataset` reads: data files, and perhaps a
README.md that says which of them belong to which split. `datasets:OWNER/NAME@COMMIT` names such a repository of the Hub, whose files are
read over the network and kept nowhere. The library is imported only if a setting names one of these.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow

from refine_titan.config.reading import DATASET_PREFIX as PREFIX
from refine_titan.data.data_files import READING_ERRORS, FolderContent, describe_files, some
from refine_titan.data.file_source import batch_rows
from refine_titan.data.fingerprint import sampled_fingerprints
from refine_titan.data.rows import DocumentSource, Row, RowReader, rows_from
from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.links import leads_outside
from refine_titan.hub.cache import Wanted, explained, find_commit
from refine_titan.hub.names import HubName, hub_name
from refine_titan.models.model_config import read_json

STATE_FILE, SPLITS_FILE, CARD_FILE = "state.json", "dataset_dict.json", "README.md"
# Readers of `datasets` 5.2.0 that read data only. Others unpickle (pandas, webdataset) or decode media.
READERS = ("arrow", "csv", "json", "parquet", "text")
BATCH_ROWS = 64
# Exceptions that `datasets` 5.2.0 raises if a folder or file is not what it should be.
LIBRARY_ERRORS = (*READING_ERRORS, ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError)


def names_dataset(source: str) -> bool:
    """Whether the value of a setting names a dataset of Hugging Face."""
    folder = Path(source)
    return source.startswith(PREFIX) or (folder / STATE_FILE).is_file() or (folder / SPLITS_FILE).is_file()


class DatasetSource(DocumentSource):
    """One split of a dataset. Its files are parts that are read one after the other."""

    def __init__(
        self,
        parts: list[Callable[[int], tuple[int, Iterator[pyarrow.Table]]]],
        split: str,
        paths: list[Path],
        left_out: dict[str, list[str]],
        reader: RowReader,
        where: str,
        num_rows: int | None,
        name: HubName | None = None,
    ):
        """
        Args:
            parts: each takes the number of the first row that is wanted, and gives tables and the number of their first row.
            split: name of the split.
            paths: the data files, for the fingerprint and the description; those of the Hub as they are called there.
            left_out: reason -> what is not read.
            reader: says which columns are read, and makes rows of their values.
            where: setting and folder, for messages.
            num_rows: rows of the only part; None if they are not known.
            name: the repository of the Hub, whose commit tells what its files hold; None for local files.

        Raises:
            UserError: the first rows cannot be read, or lack a column.
        """
        self.parts, self.split, self.paths, self.left_out = parts, split, paths, left_out
        self.reader, self.where, self.name = reader, where, name
        self._num_rows = {} if num_rows is None else {0: num_rows}
        self._is_streamed = num_rows is None
        with _naming(where):
            for path in paths if name is None else ():
                refuse_lfs_pointer(path)
            first = next((table for part in parts for table in part(0)[1]), None)
        if first is not None:
            reader.check_schema(first.schema, f"{where}, split {split!r},")

    def num_files(self) -> int:
        return len(self.parts)

    def file_name(self, file: int) -> str:
        return self.split if len(self.parts) == 1 else f"{self.split}-{file}"

    def num_rows(self, file: int) -> int:
        if file not in self._num_rows:
            with _naming(self.where):
                self._num_rows[file] = sum(table.num_rows for table in self.parts[file](0)[1])
        return self._num_rows[file]

    def identity(self) -> list:
        return ["datasets", self.split, *self._file_identities, *self.reader.identity()]

    @cached_property
    def _file_identities(self) -> list:
        if self.name is not None:
            return [str(self.name)]
        return [[path.name, *found] for path, found in zip(self.paths, sampled_fingerprints(self.paths, self.where))]

    def description(self) -> list[str]:
        known = sum(self._num_rows.values()) if len(self._num_rows) == len(self.parts) else None
        if self.name is not None:
            left_out = [f"left out, {len(names)} ({reason}): {some(names)}" for reason, names in sorted(self.left_out.items())]
            files = f"{len(self.paths)} file(s), streamed: {some([path.name for path in self.paths])}"
            return [f"split {self.split!r} of the data set {self.name} of the Hugging Face Hub", files, *left_out]
        return [
            f"split {self.split!r} of a dataset of Hugging Face",
            *describe_files(self.paths, FolderContent(left_out=self.left_out), known),
        ]

    def why_in_order(self) -> str | None:
        return "is streamed, so that neither its length is known nor any row found at once" if self._is_streamed else None

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        yield from self._wanted_rows(file, rows_from(first_row, stride))

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        if not self._is_streamed:  # every row is found at once
            return dict(next(self._wanted_rows(file, [number])) for number in numbers)
        found = {}
        for row, content in self._wanted_rows(file, sorted(numbers)):
            found[row] = content
            if len(found) == len(numbers):
                break
        return found

    def _wanted_rows(self, file: int, wanted: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows with the numbers `wanted`, which ascend."""
        with _naming(self.where):
            begin, tables = self.parts[file](next(iter(wanted), 0))
            for table in tables:
                yield from batch_rows(table.combine_chunks().to_batches(), self.reader, wanted, self.where, begin)
                begin += table.num_rows
        self._num_rows.setdefault(file, begin)  # so that nothing is read a second time to count it


def open_dataset(source: str, split: str, subset: str, reader: RowReader, setting: str = "data.source") -> DatasetSource:
    """Opens one split of a dataset that a setting names.

    Args:
        split: empty for `train`, or for the only split.
        subset: name of the configuration, if the folder has several.

    Raises:
        UserError: the folder or repository does not exist or is no dataset, has no such split, or names data elsewhere.
    """
    name = hub_name(source.removeprefix(PREFIX)) if source.startswith(PREFIX) else None
    if name is not None:
        return _open_hub(name, split, subset, reader, setting)
    folder = Path(source.removeprefix(PREFIX)).expanduser()
    where = f"{setting}: {folder}"
    if not folder.is_dir():
        raise UserError(f"{setting} is {source!r}: no such folder; allowed after {PREFIX!r}: a local folder, or OWNER/NAME of the Hub")
    if (folder / STATE_FILE).is_file() or (folder / SPLITS_FILE).is_file():
        return _open_saved(folder, split, subset, reader, where)
    return _open_streaming(folder, split, subset, reader, where)


def _open_saved(folder: Path, split: str, subset: str, reader: RowReader, where: str) -> DatasetSource:
    if subset:
        raise UserError(f"data.subset is {subset!r}; {where} was written by save_to_disk, which keeps no subsets; allowed: ''")
    left_out, part = {}, folder
    if (folder / SPLITS_FILE).is_file():
        splits = read_json(folder / SPLITS_FILE).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) and Path(name).name == name for name in splits):
            raise UserError(f"{folder / SPLITS_FILE}: splits is {splits!r:.80}; expected a list of names of folders")
        split = _choose(split, splits, where)
        left_out, part = {"another split": [name for name in splits if name != split]}, folder / split
    files = read_json(part / STATE_FILE).get("_data_files")
    names = [entry.get("filename") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{part / STATE_FILE}: _data_files is {files!r:.80}; expected names of files in this folder")
    with _naming(where):
        import datasets

        for name in names:
            refuse_lfs_pointer(part / name)
        dataset = datasets.load_from_disk(str(part))
    own = "" if dataset.split is None else str(dataset.split)
    if part is folder and split not in ("", own):
        raise UserError(f"data.split is {split!r}; {where} has only {f'the split {own!r}' if own else 'one split, without a name'}")
    found = split or own or "all"

    def tables(first_row: int) -> tuple[int, Iterator[pyarrow.Table]]:
        first = min(first_row, len(dataset))
        return first, dataset.select(range(first, len(dataset))).with_format("arrow").iter(BATCH_ROWS)

    return DatasetSource([tables], found, [part / name for name in names], _some(left_out), reader, where, len(dataset))


def _open_streaming(folder: Path, split: str, subset: str, reader: RowReader, where: str, name: HubName | None = None) -> DatasetSource:
    """Opens a folder; `name` is the repository of the Hub of which it is a part of the cache."""
    _refuse_remote(folder, where)
    with _naming(where), tempfile.TemporaryDirectory() as cache:
        import datasets

        builder = _checked(datasets.load_dataset_builder(str(folder), subset or None, cache_dir=cache), where)
        files = {str(split): [Path(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
        for path in (path for paths in files.values() for path in paths):
            if not path.is_file() or leads_outside(path, folder):
                raise UserError(f"{where} names {path}, which is no file inside it")
        split = _choose(split, list(files), where)
        for path in files[split]:
            refuse_lfs_pointer(path)
        return _streamed(builder, split, files, reader, where, name)


def _open_hub(name: HubName, split: str, subset: str, reader: RowReader, setting: str) -> DatasetSource:
    """Opens a repository of the Hub; without the network, what `hf download --repo-type dataset` has put into the cache."""
    where, wanted = f"{setting}: {name}", Wanted(setting, name, "dataset")
    name = HubName(name.repository, find_commit(wanted))
    wanted = wanted.at(name.revision)
    with explained(wanted):
        from huggingface_hub import constants, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError

        if constants.is_offline_mode():
            folder = Path(snapshot_download(name.repository, repo_type="dataset", revision=name.revision, local_files_only=True))
            return _open_streaming(folder, split, subset, reader, where, name)
        try:
            card = hf_hub_download(name.repository, CARD_FILE, repo_type="dataset", revision=name.revision)
        except EntryNotFoundError:
            card = None
    if card is not None:
        _refuse_remote(Path(card).parent, where)
    with explained(wanted), _naming(where), tempfile.TemporaryDirectory() as cache:
        import datasets

        builder = datasets.load_dataset_builder(name.repository, subset or None, revision=name.revision, cache_dir=cache)
        builder, inside = _checked(builder, where), f"hf://datasets/{name}/"
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        for path in (path for paths in files.values() for path in paths):
            if not path.startswith(inside):
                raise UserError(f"{where} names {path}, which is no file of the repository")
        files = {split: [Path(path.removeprefix(inside)) for path in paths] for split, paths in files.items()}
        return _streamed(builder, _choose(split, list(files), where), files, reader, where, name)


def _checked(builder: Any, where: str) -> Any:
    """A builder of the library whose reader reads data only."""
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in READERS:
        raise UserError(f"{where} is of the kind {kind!r}; allowed: {', '.join(READERS)}")
    return builder


def _streamed(builder: Any, split: str, files: dict[str, list[Path]], reader: RowReader, where: str, name: HubName | None) -> DatasetSource:
    stream = builder.as_streaming_dataset(split=split)
    count = stream.num_shards

    def part(number: int, first_row: int) -> tuple[int, Iterator[pyarrow.Table]]:
        # A stream is read from its beginning: rows before the first that is wanted are not made into objects.
        return 0, iter(stream.shard(num_shards=count, index=number).with_format("arrow").iter(BATCH_ROWS))

    left_out = {"another split": [other for other in files if other != split]}
    return DatasetSource([partial(part, i) for i in range(count)], split, files[split], _some(left_out), reader, where, None, name)


def _choose(split: str, splits: list[str], where: str) -> str:
    chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        raise UserError(f"data.split is {split!r}; {where} has the splits: {', '.join(splits) or 'none'}")
    return chosen


def _refuse_remote(folder: Path, where: str) -> None:
    """Raises UserError if the README.md of a dataset names files on other machines, before the library asks for them."""
    if not (folder / CARD_FILE).is_file():
        return
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    with _naming(where):
        try:
            card = json.dumps((metadata_load(folder / CARD_FILE) or {}).get("configs"), default=str)
        except YAMLError as error:
            raise UserError(f"{where}: {CARD_FILE} does not begin with valid YAML: {str(error).partition(chr(10))[0]}") from error
    if "://" in card:
        raise UserError(f"{where}: {CARD_FILE} names data on other machines; allowed: files of the folder itself. Download them")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turns errors of the library into a UserError that names setting and folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The network's errors are those of the HTTP library that huggingface_hub uses, httpx or its successor.
        if not isinstance(error, LIBRARY_ERRORS) and not type(error).__module__.startswith("httpx"):
            raise
        cause = error.__cause__ or error
        raise UserError(f"{where} cannot be read by the library datasets: {str(cause).strip().partition(chr(10))[0]}") from error


def _some(left_out: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {reason: names for reason, names in left_out.items() if names}
