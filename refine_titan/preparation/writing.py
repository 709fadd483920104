"""Writes shards. The same records give the same bytes, whichever units they come from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from refine_titan.files.whole_files import new_file
from refine_titan.preparation.files import file_sha256
from refine_titan.preparation.layout import ShardPlan, greedy_cuts
from refine_titan.preparation.units import BOOKKEEPING, unit_path

ROW_GROUP_TOKENS = 1 << 20
MAX_OPEN_UNITS = 256


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest describes it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    shortest: int
    longest: int


def finished_shard(number: int, folder: Path) -> Shard | None:
    """The shard that an earlier call wrote, or None. Its description in `folder` is written after the shard is on disk."""
    path = folder / f"{_name(number)}.json"
    return Shard(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write_shard(plan: ShardPlan, units: Path, folder: Path, out: Path) -> Shard:
    """Writes a shard from the unit files in `units` into `out`, then its description into `folder`.

    Raises:
        OSError: a file cannot be written.
    """
    reader = _UnitReader(units)
    columns = reader.table(int(plan.units[0])).schema
    schema = pyarrow.schema([item for item in columns if item.name not in BOOKKEEPING.names])
    path = out / _name(plan.number)
    cuts = greedy_cuts(plan.tokens, ROW_GROUP_TOKENS)
    # A dictionary would not help: no column has values that recur often. Page checksums let a reader notice damage.
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with new_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for start, stop in zip(cuts, cuts[1:]):
            runs = reader.runs(plan.units[start:stop], plan.rows[start:stop])
            table = pyarrow.concat_tables([run.select(schema.names) for run in runs]).combine_chunks()
            writer.write_table(table, row_group_size=stop - start)
    shard = Shard(
        path.name,
        len(plan.rows),
        int(plan.tokens.sum(dtype=np.int64)),
        path.stat().st_size,
        file_sha256(path),
        int(plan.tokens.min()),
        int(plan.tokens.max()),
    )
    with new_file(folder / f"{_name(plan.number)}.json") as file:
        file.write(json.dumps(asdict(shard)).encode("utf-8"))
    return shard


def _name(number: int) -> str:
    return f"shard-{number:05}.parquet"


class _UnitReader:
    """Reads records of unit files, which are mapped into memory, so that only what is used is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tables: dict[int, pyarrow.Table] = {}

    def table(self, unit: int) -> pyarrow.Table:
        if unit not in self._tables:
            if len(self._tables) >= MAX_OPEN_UNITS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[unit] = pyarrow.ipc.open_file(pyarrow.memory_map(str(unit_path(self.folder, unit)))).read_all()
        return self._tables[unit]

    def runs(self, units: np.ndarray, rows: np.ndarray) -> list[pyarrow.Table]:
        """The records in order, as slices of unit files; consecutive records share a slice."""
        breaks = np.flatnonzero((np.diff(units.astype(np.int64)) != 0) | (np.diff(rows.astype(np.int64)) != 1)) + 1
        borders = [0, *breaks.tolist(), len(rows)]
        return [self.table(int(units[a])).slice(int(rows[a]), b - a) for a, b in zip(borders, borders[1:])]
