import resource

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator keeps its memory by itself")


def test_freed_memory_is_taken_again_without_fresh_pages():
    block_bytes = 96 * 2**20  # above every threshold at which glibc asks the system for a block
    torch.ones(block_bytes, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(block_bytes, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < block_bytes / resource.getpagesize() / 10
