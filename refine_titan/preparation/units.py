"""A unit of work: a few MB of input, which one process tokenizes and filters into one intermediate file."""

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow

from refine_titan.data.rows import Row
from refine_titan.data.tokenizer import load_tokenizer, tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.files.whole_files import new_file
from refine_titan.preparation.inputs import InputFile, Inventory, Segment, read_segment
from refine_titan.preparation.records import HASH_BYTES, Record, build_converter, record_table
from refine_titan.preparation.settings import Settings

FLUSH_TOKENS = 1 << 20
# Columns of the intermediate file that come before those of the shard.
BOOKKEEPING = pyarrow.schema([("content_hash", pyarrow.binary(HASH_BYTES)), ("piece", pyarrow.uint32()), ("all_tokens", pyarrow.uint32())])


class Unit(NamedTuple):
    """Consecutive segments of the input files."""

    number: int
    segments: tuple[tuple[InputFile, Segment], ...]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for _, segment in self.segments)


@dataclass
class UnitReport:
    """Counts of a unit.

    Attributes:
        rows: rows read.
        kept_rows: rows that gave records.
        tokens_read: tokens of all rows that were tokenized.
        skipped: rows that gave no records, by reason.
    """

    rows: int = 0
    kept_rows: int = 0
    tokens_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count

    def add(self, other: "UnitReport") -> None:
        """Adds the counts of another unit."""
        self.rows += other.rows
        self.kept_rows += other.kept_rows
        self.tokens_read += other.tokens_read
        for reason, count in other.skipped.items():
            self.skip(reason, count)


def plan_units(files: list[InputFile], inventories: list[Inventory], unit_bytes: int) -> list[Unit]:
    """Groups all segments, in order, into units of about `unit_bytes`."""
    units, pending, nbytes = [], [], 0
    for file, inventory in zip(files, inventories):
        for segment in inventory.segments:
            if pending and nbytes + segment.nbytes > unit_bytes:
                units.append(Unit(len(units), tuple(pending)))
                pending, nbytes = [], 0
            pending.append((file, segment))
            nbytes += segment.nbytes
    return [*units, Unit(len(units), tuple(pending))] if pending else units


def unit_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.arrow"


def has_finished_units(folder: Path) -> bool:
    return any(folder.glob("*.arrow"))


def finished_unit(folder: Path, number: int) -> UnitReport | None:
    """The report of a unit that an earlier call finished, or None. The report is written after the unit's records are on disk."""
    path = unit_path(folder, number).with_suffix(".json")
    return UnitReport(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def process_unit(unit: Unit, folder: Path, settings: Settings, tokenizer: tuple[str, str]) -> UnitReport:
    """Tokenizes and filters a unit into a file in `folder`.

    Args:
        tokenizer: folder of the tokenizer, and its SHA-256.

    Raises:
        UserError: an input cannot be read, or the tokenizer has changed.
        OSError: `folder` cannot be written.
    """
    converter = build_converter(settings, _tokenizer(*tokenizer))
    schema = pyarrow.schema([*BOOKKEEPING, *converter.schema])
    report, path = UnitReport(), unit_path(folder, unit.number)
    pending, pending_tokens = [], 0
    with new_file(path) as file, pyarrow.ipc.new_file(file, schema) as writer:
        for input_file, segment in unit.segments:
            for number, values in read_segment(input_file, segment, settings):
                report.rows += 1
                if isinstance(values, Row):
                    report.skip(values.skip_reason)
                    continue
                converted = converter.convert(f"{input_file.name}:{number}", values)
                report.tokens_read += converted.tokens_read
                if not converted.records:
                    report.skip(converted.skip_reason)
                    continue
                report.kept_rows += 1
                pending += converted.records
                pending_tokens += sum(record.num_tokens for record in converted.records)
                if pending_tokens >= FLUSH_TOKENS:
                    writer.write_table(_table(pending, schema, converter.schema))
                    pending, pending_tokens = [], 0
        if pending:
            writer.write_table(_table(pending, schema, converter.schema))
    with new_file(path.with_suffix(".json")) as file:
        file.write(json.dumps(asdict(report)).encode("utf-8"))
    return report


def _table(records: list[Record], schema: pyarrow.Schema, columns: pyarrow.Schema) -> pyarrow.Table:
    bookkeeping = [
        pyarrow.array([record.content_hash for record in records], BOOKKEEPING.field("content_hash").type),
        pyarrow.array([record.piece for record in records], pyarrow.uint32()),
        pyarrow.array([record.num_tokens for record in records], pyarrow.uint32()),
    ]
    return pyarrow.Table.from_arrays([*bookkeeping, *record_table(records, columns).columns], schema=schema)


@lru_cache(maxsize=1)
def _tokenizer(folder: str, sha256: str):
    tokenizer = load_tokenizer(folder, "--tokenizer")
    if tokenizer_sha256(tokenizer) != sha256:
        raise UserError(f"--tokenizer {folder} has changed while it was used")
    return tokenizer
