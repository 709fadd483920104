"""The chunks of packed sequences as planned on the host, against flash-linear-attention's own index arithmetic."""

import torch
from fla.ops.utils import prepare_chunk_indices, prepare_chunk_offsets
from hypothesis import given, settings

from refine_kernels.delta_rule.chunk_kernels import CHUNK, _plan
from tests.helpers import packings


@given(packings())
@settings(max_examples=50, deadline=None)
def test_planned_chunks_are_those_that_the_kernels_would_count(cu_seqlens):
    starts, chunks, first_chunks, _ = (part.on(torch.device("cpu")) for part in _plan(cu_seqlens, ()))
    assert starts.tolist() == list(cu_seqlens)
    assert torch.equal(chunks, prepare_chunk_indices(starts, CHUNK)) and chunks.dtype == starts.dtype
    assert torch.equal(first_chunks, prepare_chunk_offsets(starts, CHUNK))
