"""Computes fingerprints of the content of files without reading all of it."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from refine_titan.errors import UserError
from refine_titan.files.reasons import naming

BLOCK_BYTES = 1 << 14
# Blocks that are read of one file, and about how many of all files together: a folder of any number of files begins within seconds.
MAX_BLOCKS, TOTAL_BLOCKS = 64, 4096
# Files are read in threads, because opening a file is mostly waiting where the disk is cold or far away.
THREADS = 8


def sampled_fingerprints(paths: Sequence[Path], setting: str = "data.source") -> list[tuple[int, str]]:
    """Sizes in bytes and fingerprints of files, each of `MAX_BLOCKS` blocks; of fewer, but at least one, if there are many files.

    Raises:
        UserError: a file cannot be read; the message names it and the setting.
    """
    blocks = max(1, min(MAX_BLOCKS, TOTAL_BLOCKS // max(1, len(paths))))
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(partial(sampled_fingerprint, blocks=blocks), paths))
    except OSError as error:
        raise UserError(f"{setting}: {error.filename} cannot be read: {error.strerror}") from error


def sampled_fingerprint(path: Path, blocks: int) -> tuple[int, str]:
    """The size of a file in bytes, and a hash of blocks of its stored bytes.

    A file of up to `blocks * BLOCK_BYTES` bytes is hashed whole. Of a larger one, blocks at equal distances are hashed, including the
    first and the last; a single block is in the middle. A change between the blocks that keeps the size is not noticed.
    """
    digest = hashlib.blake2b(digest_size=12)
    with naming(path), path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        if size <= blocks * BLOCK_BYTES:
            digest.update(file.readall())
        else:
            for i in range(blocks):
                file.seek((size - BLOCK_BYTES) * i // (blocks - 1) if blocks > 1 else (size - BLOCK_BYTES) // 2)
                digest.update(file.read(BLOCK_BYTES))
    return size, digest.hexdigest()
