"""Counts the work of each rank of a layout in which ranks share a sequence (context parallelism)."""

from dataclasses import dataclass

import torch

from refine_titan.models import build_decoder
from refine_titan.models.attention.shares import AttendedKeys, Spans, attention_shares, clipped, count
from refine_titan.models.decoder import DecoderArgs

COMPUTE_BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class SharedWork:
    """The work of ranks that share a sequence, and what layers with attention move for it.

    Attributes:
        of_attention: share of scores and averages of attention in the operations of a next-token step.
        slowest_of_shards: operations of the slowest rank over the mean, if each rank attended for its own shard.
        slowest: the same as it is computed.
        gathered: bytes of keys and values that a rank receives for one layer of attention.
        moved: bytes of queries and outputs that a rank receives for one layer of attention, at most.
    """

    of_attention: float
    slowest_of_shards: float
    slowest: float
    gathered: int
    moved: int


def shared_work(args: DecoderArgs, cu_seqlens: tuple[int, ...], num_ranks: int) -> SharedWork:
    """Counts a forward and its backward over a packed sequence, computed in bfloat16, without what the delta rule adds at borders.

    Raises:
        ValueError: if no layer has attention.
    """
    attentions = [a for a in map(args.attention_of, range(args.n_layers)) if a is not None]
    if not attentions:
        raise ValueError("no layer has attention: ranks that share a sequence have equal work")
    with torch.device("meta"):
        model = build_decoder(args)
    # Parameters twice, an added and a multiplied number each, and twice that in backward; attention per pair of token and key.
    num_params, per_token = args.get_nparams_and_flops(model, 1)
    per_token -= 3 * sum(a.flops_per_token(1) for a in attentions)
    per_key = 3 * sum(4 * a.n_heads * a.head_dim for a in attentions)
    n, keys = cu_seqlens[-1] // num_ranks, AttendedKeys(cu_seqlens)
    shards: tuple[Spans, ...] = tuple(((rank * n, (rank + 1) * n),) for rank in range(num_ranks))
    shares = attention_shares(cu_seqlens, num_ranks) or shards
    attention = per_key * keys.of(((0, cu_seqlens[-1]),))
    whole = cu_seqlens[-1] * per_token + attention

    def slowest(spans_of_ranks: tuple[Spans, ...]) -> float:
        return (n * per_token + per_key * max(map(keys.of, spans_of_ranks))) * num_ranks / whole

    first = attentions[0]
    away = max(n - count(clipped(spans, *shard[0])) for spans, shard in zip(shares, shards))
    return SharedWork(
        attention / whole,
        slowest(shards),
        slowest(shares),
        (cu_seqlens[-1] - n) * 2 * first.n_kv_heads * first.head_dim * COMPUTE_BYTES,
        away * 2 * first.n_heads * first.head_dim * COMPUTE_BYTES,
    )
