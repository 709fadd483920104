"""Index arithmetic on the host for a pass over packed sequences, shared by all layers. Legend: N sequences, P positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from refine_kernels.packing import cached_plan
from refine_kernels.past_tokens import host_tensor, own_starts, position_array, sequences_before


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence inside one chunk.

    Attributes:
        index: its index among all pieces, in the order of tokens.
        length: number of its tokens.
        updates: whether it ends its chunk and the weights after it are needed.
    """

    index: int
    length: int
    updates: bool


class Plan(NamedTuple):
    """The result of `plan_pass`.

    Attributes:
        pieces: the pieces of each sequence.
        lengths: number of tokens of each piece.
        past_counts: for each sequence, the number of past tokens that are in its first piece's chunk and not yet in sums.
        chunk_lengths: tokens of each piece, including those past ones.
        seen, num_summed, token_end: fields of `LaCTState` at each position, `[P]`.
        sequence: the sequence of each position, `[P]`.
        version: index into `versions` of each position's weights, `[P]`.
        versions: for each version of the weights that a position needs, its sequence and the number of updates before it.
    """

    pieces: list[list[Piece]]
    lengths: list[int]
    past_counts: list[int]
    chunk_lengths: list[int]
    seen: torch.Tensor
    num_summed: torch.Tensor
    sequence: torch.Tensor
    token_end: torch.Tensor
    version: torch.Tensor
    versions: list[tuple[int, int]]


@cached_plan(maxsize=16)
def plan_pass(
    cu_seqlens: tuple[int, ...],
    seen: tuple[int, ...],
    num_summed: tuple[int, ...],
    chunk_size: int,
    positions: tuple[int, ...] | range,
) -> Plan:
    """Cuts sequences at chunk borders, and finds where each position's state comes from.

    Args:
        seen: number of tokens that each of the first sequences has read before.
        num_summed: how many of those since the last chunk border are in sums.
    """
    num_sequences = len(cu_seqlens) - 1
    seen = (*seen, *[0] * (num_sequences - len(seen)))
    num_summed = (*num_summed, *[0] * (num_sequences - len(num_summed)))
    past_counts = [before % chunk_size - summed for before, summed in zip(seen, num_summed)]
    pieces = _pieces(cu_seqlens, seen, chunk_size, positions if isinstance(positions, range) else set(positions))
    lengths = [piece.length for own in pieces for piece in own]
    first_of = {own[0].index: n for n, own in enumerate(pieces)}
    chunk_lengths = [length + (past_counts[first_of[i]] if i in first_of else 0) for i, length in enumerate(lengths)]

    r = position_array(positions)
    sequence = sequences_before(r, cu_seqlens)
    seen_N, start_N, own_N, summed_N = (np.array(x) for x in (seen, cu_seqlens[:-1], own_starts(cu_seqlens, past_counts), num_summed))
    total = seen_N[sequence] + r - start_N[sequence]
    updates = total // chunk_size - seen_N[sequence] // chunk_size
    pairs, version = np.unique(np.stack([sequence, updates]), axis=1, return_inverse=True)
    summed_P = np.where(updates == 0, summed_N[sequence], 0)
    token_end = own_N[sequence] + r - start_N[sequence]
    of_positions = map(host_tensor, (total, summed_P, sequence, token_end, version.reshape(-1)))
    return Plan(pieces, lengths, past_counts, chunk_lengths, *of_positions, list(zip(*pairs.tolist())))


def _pieces(cu_seqlens: Sequence[int], seen: Sequence[int], chunk_size: int, wanted: range | set[int]) -> list[list[Piece]]:
    """The pieces of each sequence."""
    pieces, index = [], 0
    for before, start, end in zip(seen, cu_seqlens, cu_seqlens[1:]):
        own, token = [], start
        while token < end:
            stop = min(end, token + chunk_size - (before + token - start) % chunk_size)
            is_full = (before + stop - start) % chunk_size == 0
            own.append(Piece(index, stop - token, is_full and (stop < end or stop in wanted)))
            token, index = stop, index + 1
        pieces.append(own)
    return pieces
