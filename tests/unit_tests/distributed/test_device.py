"""The C allocator keeps the memory of freed tensors."""

import resource

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator keeps its memory by itself")


def test_freed_memory_is_taken_again_without_fresh_pages():
    block_bytes = 96 * 2**20  # above every threshold at which glibc asks the system for a block
    faults = []
    # In a heap with gaps a block may first be put into another gap than the one before it; one that glibc returns is fresh every time.
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(block_bytes, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < block_bytes / resource.getpagesize() / 10
