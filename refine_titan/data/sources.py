"""Sources of documents. A source is a list of files, a file a list of rows, and a row one document or a reason to skip it."""

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from refine_titan.config.sections import Data
from refine_titan.data.data_files import COMPRESSIONS, FolderContent, format_of, list_folder
from refine_titan.data.file_source import TABLE_FORMATS, TEXT_FORMAT, FileSource
from refine_titan.data.hf_datasets import names_dataset, open_dataset
from refine_titan.data.rows import DocumentSource, Row, TextReader
from refine_titan.data.shards import MANIFEST, ShardSource, is_prepared
from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.errors import UserError

# Values of `data.source` that are no paths.
WORDS = ("synthetic", "python-stdlib")


class SyntheticSource(DocumentSource):
    """Endless generated documents; row i is a function of (seed, i)."""

    def __init__(self, corpus: RetrievalCorpus):
        self.corpus = corpus

    def num_files(self) -> int:
        return 1

    def file_name(self, file: int) -> str:
        return "synthetic"

    def num_rows(self, file: int) -> int:
        raise AssertionError("a synthetic corpus has no end")

    def description(self) -> list[str]:
        return [f"generated documents of {self.corpus.num_tokens:,} tokens with {self.corpus.num_needles} needles"]

    def identity(self) -> list:
        return ["synthetic", self.corpus.num_tokens, self.corpus.num_needles]

    def why_in_order(self) -> str:
        return "is generated without end"

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        return {row: Row(self.corpus.document(row)) for row in numbers}

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        row = first_row
        while True:
            yield row, Row(self.corpus.document(row))
            row += stride


def build_source(data: Data, tokenizer, seq_len: int, seed: int, setting: str = "data.source") -> DocumentSource:
    """Builds the source that `data.source` names.

    Args:
        setting: the setting that gave `data.source` its value, for error messages.

    Raises:
        UserError: the path does not exist or holds no readable file, or a table lacks the column, or `data.split` or `data.subset` is set
            and the source is read whole.
    """
    refuse_part_of_whole(data, setting)
    if data.source == "synthetic":
        if data.min_document_tokens > seq_len:
            raise UserError(
                f"data.min_document_tokens is {data.min_document_tokens}; synthetic documents have training.seq_len = "
                f"{seq_len} tokens, allowed: at most that"
            )
        return SyntheticSource(RetrievalCorpus(tokenizer, num_tokens=seq_len, num_needles=data.synthetic_needles, seed=seed))
    if data.source == "python-stdlib":
        return FileSource(standard_library(), TextReader(data.text_column), Path(sysconfig.get_paths()["stdlib"]))
    path = Path(data.source)
    if names_dataset(data.source):
        return open_dataset(data.source, data.split, data.subset, TextReader(data.text_column), setting)
    if is_prepared(path):
        return _prepared_source(path, data, tokenizer, seq_len, setting)
    if path.is_file():
        if format_of(path) == ".parquet" and is_prepared(path.parent):
            raise UserError(f"{setting} is {data.source!r}, a part of prepared data; name the folder that holds {MANIFEST}")
        check_format(path, (TEXT_FORMAT, *TABLE_FORMATS, *data.folder_suffixes), f"{setting} is {data.source!r}")
        return FileSource([path], TextReader(data.text_column), path, setting=setting)
    if path.is_dir():
        content = list_files(path, data.folder_suffixes, setting)
        return FileSource(content.files, TextReader(data.text_column), path, content, setting)
    raise UserError(
        f"{setting} is {data.source!r}: no such file or folder; or use 'python-stdlib', 'synthetic', or owner/name of a data set of the Hub"
    )


def refuse_part_of_whole(data: Data, setting: str = "data.source") -> None:
    """Raises UserError if `data.split` or `data.subset` is set and the source is no dataset of Hugging Face, so that all of it is read.

    A source that does not exist is left to whoever builds it.
    """
    path = Path(data.source)
    if names_dataset(data.source) or not (data.source in WORDS or path.exists()):
        return
    for name in ("split", "subset"):
        if value := getattr(data, name):
            way = f"; 'datasets:{data.source}' reads the folder as a dataset" if path.is_dir() and not is_prepared(path) else ""
            raise UserError(
                f"data.{name} is {value!r}, but {setting} is {data.source!r}, which is no dataset of Hugging Face and is read whole; "
                f"allowed: ''{way}"
            )


def check_format(path: Path, formats: Sequence[str], found: str) -> None:
    """Raises UserError, whose message begins with `found`, unless a file has one of the formats."""
    if format_of(path) not in formats:
        allowed = ", ".join(dict.fromkeys(formats))
        raise UserError(f"{found}; allowed files end in {allowed}, or in one of them and {' or '.join(COMPRESSIONS)}")


def list_files(folder: Path, formats: Sequence[str], setting: str = "data.source") -> FolderContent:
    """Lists the files of a folder that are of one of the formats.

    Raises:
        UserError: there is none.
    """
    content = list_folder(folder, formats)
    if not content.files:
        raise UserError(f"{setting}: the folder {folder} holds no file ending in {', '.join(formats)}")
    return content


def _prepared_source(path: Path, data: Data, tokenizer, seq_len: int, setting: str) -> ShardSource:
    source = ShardSource(path, tokenizer, with_origins=data.holdout_percent > 0, setting=setting)
    min_tokens = data.min_document_tokens or seq_len
    if source.longest_document < min_tokens:
        raise UserError(
            f"{setting}: the documents of {path} have at most {source.longest_document} tokens; data.min_document_tokens "
            f"({min_tokens}, by default training.seq_len) may be at most that, or prepare the data with a larger --max-tokens"
        )
    return source


def standard_library() -> list[Path]:
    """The modules of Python's standard library, without installed packages and without its tests, which some distributions lack."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts[:-1]))
