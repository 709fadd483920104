"""Measures what checksums cost when a checkpoint is written and read.

    python tools/benchmark_checkpoints.py [--gib 4] [--tensors 64] [--repeats 3] [--cold] [--folder DIR]

Writes and reads random tensors of that size together with torch's writer and reader and with those of this project, in alternation, in one
process. Prints one JSON object with the medians of the seconds, and for both directions the ratio of each pair. DIR needs room for one
copy. With --cold the system forgets the file's pages before they are read, as after a restart or on another machine.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
import torch.distributed.checkpoint as dcp

from refine_titan.conversion.dcp_checksums import ChecksumWriter
from refine_titan.conversion.dcp_metadata import CheckedReader

KINDS = {"plain": (dcp.FileSystemWriter, dcp.FileSystemReader), "checksums": (ChecksumWriter, CheckedReader)}


def seconds_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def forget_pages(folder: Path) -> None:
    """Drops the content of a folder's files from the system's cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only what is on the disk can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(state: dict[str, torch.Tensor], folder: Path, repeats: int, is_cold: bool) -> dict:
    seconds = {direction: {kind: [] for kind in KINDS} for direction in ("write", "read")}
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for repeat in range(repeats + 1):
        for kind in list(KINDS)[:: 1 if repeat % 2 else -1]:
            writer, reader = KINDS[kind]
            shutil.rmtree(folder, ignore_errors=True)
            took = {"write": seconds_of(partial(dcp.save, state, storage_writer=writer(folder), no_dist=True))}
            if is_cold:
                forget_pages(folder)
            took["read"] = seconds_of(partial(dcp.load, target, storage_reader=reader(folder), no_dist=True))
            if repeat:  # the first round warms up
                for direction, value in took.items():
                    seconds[direction][kind].append(value)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    result = {}
    for direction, found in seconds.items():
        ratios = [with_sums / without for with_sums, without in zip(found["checksums"], found["plain"])]
        result |= {f"{direction}_seconds_{kind}": round(statistics.median(values), 3) for kind, values in found.items()}
        result |= {f"{direction}_ratio": round(statistics.median(ratios), 3), f"{direction}_ratios": [round(r, 3) for r in ratios]}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of all tensors together (4)")
    parser.add_argument("--tensors", type=int, default=64, help="number of tensors (64)")
    parser.add_argument("--repeats", type=int, default=3, help="measured pairs (3)")
    parser.add_argument("--cold", action="store_true", help="read from the disk instead of the system's cache")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (the system's folder for temporary files)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    size = int(arguments.gib * 2**30 / 4 / arguments.tensors)
    state = {f"layers.{i}.weight": torch.randn(size) for i in range(arguments.tensors)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(state, Path(folder, "checkpoint"), arguments.repeats, arguments.cold)
        print(json.dumps({"gib": arguments.gib, "cold": arguments.cold, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
