"""Decides which record goes into which shard: drops duplicates, shuffles if asked to, and cuts into shards and row groups.

The decision depends only on the bookkeeping of all units (about 40 bytes per record in memory). Shards can therefore be written in
any order, by any number of processes, with the same result.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from refine_titan.preparation.records import HASH_BYTES
from refine_titan.preparation.settings import Settings
from refine_titan.preparation.units import BOOKKEEPING, unit_path
from refine_titan.seeding import derive_seed


@dataclass(frozen=True)
class ShardPlan:
    """The records of one shard in order: for each its unit, its row in the unit's file, and its number of tokens."""

    number: int
    units: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Layout:
    """All shards, and how many rows of the input were dropped because an earlier row has the same content."""

    shards: list[ShardPlan]
    duplicate_rows: int


def plan_layout(folder: Path, num_units: int, settings: Settings) -> Layout:
    """Plans the shards for the records of the units in `folder`."""
    units, rows, tokens, pieces, hashes = _bookkeeping(folder, num_units)
    kept, duplicates = np.ones(len(rows), bool), 0
    if settings.deduplicate == "exact":
        first_pieces = pieces == 0
        is_first = first_occurrences(hashes[first_pieces])
        duplicates = int((~is_first).sum())
        kept = is_first[np.cumsum(first_pieces) - 1]  # the other pieces of a document are kept if its first piece is
    order = np.flatnonzero(kept)
    if settings.seed is not None:
        order = order[np.argsort(shuffle_keys(settings.seed, len(order)), kind="stable")]
    units, rows, tokens = units[order], rows[order], tokens[order]
    starts = greedy_cuts(tokens, settings.shard_tokens)
    shards = [ShardPlan(i, units[a:b], rows[a:b], tokens[a:b]) for i, (a, b) in enumerate(zip(starts, starts[1:]))]
    return Layout(shards, duplicates)


def greedy_cuts(tokens: np.ndarray, limit: int) -> list[int]:
    """Cuts the records into consecutive groups of as many as fit into `limit` tokens, at least one each.

    Returns the borders of the groups: the first is 0, the last the number of records.
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(tokens):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(ends, before + limit, side="right")), cuts[-1] + 1))
    return cuts


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """Whether each row of [n, 2] integers is the first one with its value, `[n]`."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in the order of the input
    ordered = hashes[order]
    is_first = np.ones(len(hashes), bool)
    is_first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return is_first


def shuffle_keys(seed: int, count: int) -> np.ndarray:
    """A pseudo-random 64-bit key for each of `count` records, by the SplitMix64 generator (Steele, Lea and Flood, 2014).

    Unlike numpy's generators it gives the same keys with every version of numpy.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(derive_seed(seed, "shuffle")) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _bookkeeping(folder: Path, num_units: int) -> tuple[np.ndarray, ...]:
    """Reads unit, row in the unit, number of tokens, piece and content hash ([n, 2]) of every record."""
    parts: tuple[list[np.ndarray], ...] = ([], [], [], [], [])
    for number in range(num_units):
        with pyarrow.memory_map(str(unit_path(folder, number))) as file:
            table = pyarrow.ipc.open_file(file, options=pyarrow.ipc.IpcReadOptions(included_fields=[0, 1, 2])).read_all()
            hashes, pieces, tokens = (table.column(name).combine_chunks() for name in BOOKKEEPING.names)
            parts[0].append(np.full(len(table), number, np.uint32))
            parts[1].append(np.arange(len(table), dtype=np.uint32))
            parts[2].append(tokens.to_numpy().copy())
            parts[3].append(pieces.to_numpy().copy())
            stored = np.frombuffer(hashes.buffers()[1], np.uint64, len(table) * HASH_BYTES // 8, hashes.offset * HASH_BYTES)
            parts[4].append(stored.reshape(-1, 2).copy())
    return tuple(np.concatenate(part) for part in parts)
