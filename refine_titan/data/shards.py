"""Reads prepared data: a folder of parquet shards with a manifest, as `refine-titan prepare` writes it.

A shard of documents has one row per document: `tokens`, `num_tokens`, and `source`, the file and row from which it comes. The manifest
holds the hash of the tokenizer, so that tokens are never read with another one.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow

from refine_titan.data.parquet_footer import CheckedParquetFile
from refine_titan.data.parquet_pages import rows_at_once
from refine_titan.data.rows import DocumentSource, Row, between, rows_from
from refine_titan.data.tokenizer import tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.files.limits import read_small_file

MANIFEST = "manifest.json"
FORMAT = "refine_titan.prepared"
VERSION = 1


class _Shard(msgspec.Struct):
    """A shard in a manifest. Its name is that of a file in the folder: nothing else is read, whatever a manifest names."""

    name: str
    rows: Annotated[int, msgspec.Meta(ge=0)]
    tokens: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str

    def __post_init__(self) -> None:
        if self.name in ("", "..") or "\0" in self.name or Path(self.name).name != self.name:
            raise ValueError(f"a shard has the name {self.name!r}, which is not that of a file in the folder")


class _Tokenizer(msgspec.Struct):
    name: str
    sha256: str
    vocab_size: int
    package: str


class _Lengths(msgspec.Struct):
    shortest: int
    longest: int


class _Manifest(msgspec.Struct):
    """The parts of a manifest that readers of the data need."""

    kind: str
    tokenizer: _Tokenizer
    lengths: _Lengths
    shards: list[_Shard]


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data of any version, as its manifest says."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        return json.loads(read_small_file(path)).get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError, OSError):
        # The manifest is not ours, or is damaged. If shards lie beside it, it is ours.
        return any(folder.glob("shard-*.parquet"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of prepared data and checks its checksum.

    Raises:
        UserError: the manifest is missing, damaged, or of another version, or names a shard outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_small_file(path))
        checksum = manifest.pop("manifest_sha256")
        found = manifest["format"], manifest["version"]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {folder} is not prepared data, or not complete") from error
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not a manifest of prepared data; prepare the data again") from error
    if found != (FORMAT, VERSION):
        wanted = f"{FORMAT} {VERSION}"
        raise UserError(f"{path} is of format {found[0]} {found[1]}; this version reads {wanted}: prepare the data again")
    if checksum != manifest_sha256(manifest):
        raise UserError(f"{path} is damaged: it does not have the checksum that it states; prepare the data again")
    try:
        msgspec.convert(manifest, _Manifest)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is no manifest of prepared data: {error}; prepare the data again") from error
    return manifest


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest, not counting its own checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()


def check_shards(folder: Path, manifest: dict[str, Any], setting: str = "data.source") -> list[Path]:
    """The paths of the shards that a manifest names.

    Raises:
        UserError: a shard is missing or has another size.
    """
    paths = []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes, the manifest says {shard['bytes']:,}"
            raise UserError(f"{setting}: {path} {found}; copy it again, or prepare the data again")
        paths.append(path)
    return paths


class ShardSource(DocumentSource):
    """The documents of prepared data, which are stored as tokens.

    Args:
        with_origins: whether rows name the file and row from which they were made.
        setting: the setting that names the folder, for error messages.

    Raises:
        UserError: the shards were made with another tokenizer, hold no documents, or are not the files that the manifest names.
    """

    def __init__(self, folder: Path, tokenizer, with_origins: bool = False, setting: str = "data.source"):
        self.folder, self._with_origins, self._setting = folder, with_origins, setting
        self.manifest = read_manifest(folder)
        if self.manifest["kind"] != "documents":
            raise UserError(f"{setting}: {folder} holds {self.manifest['kind']}, not documents; mid-training reads documents")
        self._check_tokenizer(tokenizer)
        self.shards = self.manifest["shards"]
        check_shards(folder, self.manifest, setting)

    @property
    def longest_document(self) -> int:
        return self.manifest["lengths"]["longest"]

    def num_files(self) -> int:
        return len(self.shards)

    def file_name(self, file: int) -> str:
        return self.shards[file]["name"]

    def num_rows(self, file: int) -> int:
        return self.shards[file]["rows"]

    def description(self) -> list[str]:
        nbytes, rows, tokens = (sum(shard[name] for shard in self.shards) for name in ("bytes", "rows", "tokens"))
        return [f"prepared data: {len(self.shards)} file(s), {nbytes:,} bytes, {rows:,} row(s), {tokens:,} tokens"]

    def identity(self) -> list:
        return [FORMAT] + [[shard["name"], shard["sha256"]] for shard in self.shards]

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, Row]]:
        yield from self._wanted_rows(file, rows_from(first_row, stride))

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, Row]:
        return dict(self._wanted_rows(file, sorted(numbers)))

    def _wanted_rows(self, file: int, wanted: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows with the numbers `wanted`, which ascend."""
        path = self.folder / self.shards[file]["name"]
        try:
            with CheckedParquetFile(path, page_checksum_verification=True) as parquet:
                begin, kind = 0, {field.name: field.type for field in parquet.schema_arrow}.get("tokens")
                if not pyarrow.types.is_list(kind) or not pyarrow.types.is_integer(kind.value_type):
                    raise OSError(f"its column tokens is {kind or 'missing'}; allowed: lists of whole numbers")
                rows, expected = sum(group.num_rows for group in parquet.groups), self.num_rows(file)
                if rows != expected:
                    raise OSError(f"it has {rows:,} rows, the manifest says {expected:,}")
                for group in range(len(parquet.groups)):
                    end = begin + parquet.groups[group].num_rows
                    in_group = between(wanted, begin, end)
                    if in_group:
                        columns = ["tokens", "source"] if self._with_origins else ["tokens"]
                        rows_at_once(path, parquet, group, columns, end - begin)  # refuses what does not fit
                        table = parquet.read_row_group(group, columns=columns)
                        column = table.column("tokens").combine_chunks()
                        if len(column) != end - begin:
                            raise OSError(f"row group {group} has {end - begin:,} rows by its footer, and {len(column):,} were read")
                        starts, tokens = column.offsets.to_numpy(), column.values.to_numpy()
                        for r in in_group:
                            origin = _origin(path, table, r - begin) if self._with_origins else ""
                            yield r, Row(None, "", tokens[starts[r - begin] : starts[r - begin + 1]].tolist(), origin)
                    begin = end
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self._setting}: {path} cannot be read: {error}; refine-titan prepare verify {self.folder} says what is damaged"
            ) from error

    def _check_tokenizer(self, tokenizer) -> None:
        stored, found = self.manifest["tokenizer"], tokenizer_sha256(tokenizer)
        if stored["sha256"] != found:
            name = getattr(tokenizer, "tokenizer_path", "") or "bytes"
            raise UserError(
                f"{self._setting}: {self.folder} was made with the tokenizer {stored['name']} (sha256 {stored['sha256'][:16]}, "
                f"tokenizers {stored['package']}), the run's tokenizer is {name} (sha256 {found[:16]}); set "
                "model.hf_assets_path to the former, or prepare the data with the latter"
            )


def _origin(path: Path, table: pyarrow.Table, row: int) -> str:
    """The file and row from which a document was made, without the place of a piece in it."""
    try:
        return re.sub(r"\+\d+$", "", table["source"][row].as_py())
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.source: {path} does not say whence row {row} is, which data.holdout_percent needs; prepare it again"
        ) from error
