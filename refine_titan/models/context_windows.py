"""Reads a trunk a second time with the last tokens as the only context, to find what the tokens before them change.

Every document is cut into overlapping windows of 2W tokens that begin every W tokens, and each window is read as a document of its own.
Of a window only the second half counts, so that a token that counts has more than W and at most 2W tokens of context, itself included.
Where the whole context has at most 2W tokens, nothing is read again: the gain is 0 there.

Legend: T trunk tokens, R counted tokens of this rank's windows, W width.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from refine_kernels.packing import on_device
from refine_titan.models.context_shard import ContextShard, gather_rows
from refine_titan.models.decoder import DecoderOutput
from refine_titan.models.shared_prefix import SharedPrefixLayout


class ContextWindow(NamedTuple):
    """Tokens `begin` to `end` of a trunk, of which those from `counted` on count."""

    begin: int
    counted: int
    end: int


class WindowLosses(NamedTuple):
    """Next-token losses of this rank's counted tokens.

    Attributes:
        rows_R: their indices in the whole trunk.
        nll_R: their losses, in nats; 0 where a document ends.
    """

    rows_R: torch.Tensor
    nll_R: torch.Tensor


def windows_of(shard: ContextShard, width: int) -> list[ContextWindow]:
    """The windows whose counted tokens begin in the shard; none where its documents have at most 2W tokens."""
    return [
        ContextWindow(counted - width, counted, min(counted + width, end))
        for start, end in pairwise(shard.cu_seqlens)
        for counted in range(start + 2 * width, end, width)
        if shard.begin <= counted < shard.end
    ]


@torch.no_grad()
def read_windows(
    forward: Callable[..., DecoderOutput], tokens_T: torch.Tensor, labels_T: torch.Tensor, shard: ContextShard, width: int
) -> WindowLosses:
    """Reads the windows of a shard in one packed forward. Ranks that share a trunk need nothing of each other: all of its tokens are on
    each of them.

    Args:
        forward: runs the model, in the precision of the run.
        tokens_T, labels_T: tokens and next tokens (-100 for none) of the whole trunk.
    """
    # Without windows a token is read, without use: all ranks must make equally many forwards.
    windows = windows_of(shard, width) or [ContextWindow(shard.begin, shard.begin + 1, shard.begin + 1)]
    read = _rows([(w.begin, w.end) for w in windows], tokens_T.device)
    cu_seqlens = (0, *accumulate(w.end - w.begin for w in windows))
    nll = forward(tokens_T[read], SharedPrefixLayout(cu_seqlens), labels=labels_T[read]).losses.nll_T
    places = [(at + w.counted - w.begin, at + w.end - w.begin) for at, w in zip(cu_seqlens, windows)]
    return WindowLosses(_rows([(w.counted, w.end) for w in windows], tokens_T.device), nll[_rows(places, nll.device)])


def context_gain(windows: WindowLosses, nll_T: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """How much the whole prefix lowers the loss of each token of the trunk against its last W to 2W tokens, `[T]`; 0 where these
    are the whole prefix. The same on every rank of the shard's group, all of which must call it.

    Args:
        windows: losses with short context, of this rank.
        nll_T: losses with the whole prefix, of this rank's tokens.
    """
    nll_T = gather_rows(nll_T, shard)
    gain_T = torch.zeros_like(nll_T)
    gain_T[windows.rows_R] = windows.nll_R - nll_T[windows.rows_R]
    if shard.group is not None:
        dist.all_reduce(gain_T, group=shard.group)
    return gain_T


def _rows(spans: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return on_device(torch.cat([torch.arange(*span) for span in spans]), device)
