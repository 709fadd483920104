"""Checks prepared data against their manifest, and describes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from refine_titan.data.data_files import reading
from refine_titan.data.parquet_footer import CheckedParquetFile
from refine_titan.data.parquet_pages import group_batches
from refine_titan.data.shards import MANIFEST, read_manifest
from refine_titan.errors import UserError, printable
from refine_titan.preparation.files import file_sha256
from refine_titan.preparation.settings import Settings
from refine_titan.progress import Progress

BAR_WIDTH = 40
# Rows of a shard that are read at a time, of one number each.
READ_ROWS = 1 << 16


def verify(folder: Path) -> list[str]:
    """Compares the shards with the manifest. Returns one line for each shard that is missing, damaged, or not in the manifest.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    shards = {shard["name"]: shard for shard in read_manifest(folder)["shards"]}
    problems = []
    with Progress("verifying", sum(shard["bytes"] for shard in shards.values()), "bytes") as progress:
        for name, shard in shards.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != shard["bytes"]:
                problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {shard['bytes']:,}")
            elif (found := file_sha256(path)) != shard["sha256"]:
                problems.append(f"{path} has the sha256 {found}, the manifest says {shard['sha256']}")
            progress.advance(shard["bytes"])
    extra = [path for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, *shards)]
    return problems + [f"{path} is not in the manifest" for path in extra]


def describe(folder: Path) -> str:
    """Describes prepared data for people: counts, origin and lengths.

    Raises:
        UserError: the manifest is missing or damaged, or a shard cannot be read.
    """
    manifest = read_manifest(folder)
    tokenizer = manifest["tokenizer"]
    lines = [
        summary(manifest),
        f"tokenizer: {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, sha256 {tokenizer['sha256']}",
        "settings:  " + (", ".join(_settings(manifest["settings"])) or "defaults"),
        f"inputs:    {len(manifest['inputs'])} file(s), {sum(item['bytes'] for item in manifest['inputs']):,} bytes",
    ]
    lines += [f"  {printable(item['name'])}: {item['rows']:,} rows, sha256 {item['sha256'][:16]}" for item in manifest["inputs"][:10]]
    if len(manifest["inputs"]) > 10:
        lines.append(f"  and {len(manifest['inputs']) - 10} more in {MANIFEST}")
    column = "num_tokens" if manifest["kind"] == "documents" else "prompt_tokens"
    lengths = np.concatenate([_column(folder / shard["name"], column) for shard in manifest["shards"]])
    if not len(lengths):
        raise UserError(f"{folder} has no rows, which is not what its manifest says")
    lines += [f"lengths ({column}): shortest {lengths.min():,}, median {int(np.median(lengths)):,}, longest {lengths.max():,}"]
    return "\n".join(lines + histogram(lengths))


def summary(manifest: dict[str, Any]) -> str:
    """Two lines that say how much was kept, and how many rows were skipped for which reasons."""
    counts = manifest["counts"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in counts["skipped"].items()) or "none"
    return (
        f"{manifest['kind']}: {counts['records']:,} with {counts['tokens']:,} tokens in {len(manifest['shards'])} shard(s), "
        f"from {counts['kept_rows']:,} of {counts['rows']:,} rows\nskipped:   {skipped}"
    )


def histogram(lengths: np.ndarray) -> list[str]:
    """A histogram of lengths as text: one line for every power of two, with its range, a bar and a count."""
    exponents = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    low, counts = exponents.min(), np.bincount(exponents - exponents.min())
    width = len(f"{2 ** (low + len(counts)) - 1:,}")
    lines = []
    for exponent, count in enumerate(counts.tolist(), start=low):
        bar = "#" * -(-BAR_WIDTH * count // int(counts.max()))
        lines.append(f"  {2**exponent:>{width},} to {2 ** (exponent + 1) - 1:>{width},}  {bar:<{BAR_WIDTH}}  {count:,}")
    return lines


def _settings(stored: dict[str, Any]) -> list[str]:
    """The settings that differ from the defaults, as text."""
    defaults = Settings().to_json()
    changed = {key: value for key, value in stored.items() if value != defaults[key]}
    return [f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in changed.items()]


def _column(path: Path, name: str) -> np.ndarray:
    """A column of whole numbers of a shard."""
    with reading(path), CheckedParquetFile(path) as parquet:
        found = {field.name: field.type for field in parquet.schema_arrow}.get(name)
        if found is None or not pyarrow.types.is_integer(found):
            raise OSError(f"its column {name} is {found or 'missing'}; allowed: whole numbers")
        groups = range(len(parquet.groups))
        batches = [batch for group in groups for batch in group_batches(path, parquet, group, [name], READ_ROWS)]
        return np.concatenate([np.empty(0, np.int64), *(batch.column(0).drop_null().to_numpy() for batch in batches)])
