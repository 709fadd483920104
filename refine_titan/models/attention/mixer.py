"""Softmax attention as a sequence mixer.

Legend: T tokens, D hidden channels, H query heads, K key heads, E channels of a head.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

from refine_kernels.attention import attention
from refine_kernels.past_tokens import TokenSpans, host_tensor, position_array, sequences_before
from refine_kernels.rotary import Rotation
from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.attention.decoding import AttentionDecoding
from refine_titan.models.attention.moved_rows import rows_of_shard, rows_of_share
from refine_titan.models.attention.shares import attention_shares
from refine_titan.models.context_shard import ContextShard, shared_rows
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.norms import OffsetRMSNorm
from refine_titan.models.rotation import rotation_of
from refine_titan.models.sharded_tensors import FullWidthRMSNorm
from refine_titan.models.shared_prefix import LayerState, SharedPrefixMixer, StateShape


class AttentionMixer(SharedPrefixMixer):
    """Attention of every token to its sequence's tokens up to itself. Its state refers to keys and values, which are never copied."""

    def __init__(self, args: AttentionArgs):
        super().__init__()
        self.args = args
        width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.q_proj = nn.Linear(args.dim, width, bias=args.qkv_bias)
        self.k_proj = nn.Linear(args.dim, kv_width, bias=args.qkv_bias)
        self.v_proj = nn.Linear(args.dim, kv_width, bias=args.qkv_bias)
        if args.output_gate:
            self.g_proj = nn.Linear(args.dim, width, bias=args.qkv_bias)
        if args.qk_norm == "head":
            norm = OffsetRMSNorm if args.offset_norm else nn.RMSNorm
            self.q_norm, self.k_norm = (norm(args.head_dim, eps=args.qk_norm_eps) for _ in "qk")
        elif args.qk_norm == "all heads":
            self.q_norm, self.k_norm = (FullWidthRMSNorm(w, eps=args.qk_norm_eps) for w in (width, kv_width))
        self.o_proj = nn.Linear(width, args.dim, bias=False)
        norm_plan = "heads" if args.qk_norm == "head" else "first_dim"
        columns = dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj"), "columns")
        self.tensor_parallel_plan = columns | {"q_norm": norm_plan, "k_norm": norm_plan, "o_proj": "rows"}

    def state_shapes(self, compute_dtype: torch.dtype) -> dict[str, StateShape]:
        """None: a state grows with its sequence."""
        return {}

    def bytes_read_per_token(self, compute_dtype: torch.dtype, seen: int) -> int:
        return 2 * self.args.n_kv_heads * self.args.head_dim * seen * compute_dtype.itemsize

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, not rotated yet."""
        q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        if self.args.qk_norm == "all heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.args.head_dim)) for x in (q, k, v))
        if self.args.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.to(v.dtype), k.to(v.dtype), v  # a GPU's autocast norms in float32

    def mix(self, rows, cu_seqlens, initial_state: LayerState | None, state_positions):
        past = None if initial_state is None else (initial_state.tensors["keys"], initial_state.tensors["values"])
        q, k, v = self._with_positions(rows, cu_seqlens, [] if past is None else past[0].lengths)
        at = position_array(state_positions)
        sequences = sequences_before(at, cu_seqlens)
        own = np.stack([np.array(cu_seqlens)[sequences], at], -1)
        before = past or (TokenSpans((), host_tensor([]).view(len(cu_seqlens) - 1, 0, 2)),) * 2
        states = {name: spans.extended(pool, sequences, own) for name, spans, pool in zip(("keys", "values"), before, (k, v))}
        return (attention(q, k, v, cu_seqlens, past=past),), LayerState(states)

    def mix_shard(self, rows, cu_seqlens, shard: ContextShard, state_positions):
        q, k, v = self._with_positions(rows, cu_seqlens, [shard.seen])
        keys, values = shared_rows(torch.cat([k, v], 1), shard).split([k.shape[1], v.shape[1]], 1)
        out = self._attend_in_shares(q, keys, values, shard)
        at = position_array(state_positions)
        starts = np.array(cu_seqlens[:-1]) + shard.begin
        starts[0] -= shard.seen
        own = np.stack([starts[sequences_before(np.maximum(at, 1), cu_seqlens)], at + shard.begin], -1)
        bounds = host_tensor(own.reshape(-1)).view(-1, 1, 2)
        return (out,), LayerState({"keys": TokenSpans((keys,), bounds), "values": TokenSpans((values,), bounds)})

    def _attend_in_shares(self, q, keys, values, shard: ContextShard) -> torch.Tensor:
        """Outputs of the shard's tokens, which ranks with less work compute where it saves time."""

        def attend(q, part: ContextShard) -> torch.Tensor:
            visible = slice(part.begin - part.seen, part.end)
            return attention(q, keys[visible], values[visible], part.local_cu_seqlens)

        shares = attention_shares(shard.cu_seqlens, shard.group.size())
        if shares is None:
            return attend(q, shard)
        parts = [replace(shard, begin=first, end=end) for first, end in shares[shard.group.rank()]]
        rows = rows_of_share(q, shares, shard).split([part.num_tokens for part in parts])
        return rows_of_shard(torch.cat([attend(x, part) for x, part in zip(rows, parts)]), shares, shard)

    def begin_decoding(self, state: LayerState, clock: DecodingClock, into: AttentionDecoding | None = None) -> AttentionDecoding:
        decoding = into or AttentionDecoding(clock)
        decoding.load(state.tensors["keys"], state.tensors["values"])
        return decoding

    def step(self, rows, decoding: AttentionDecoding, clock: DecodingClock) -> tuple[torch.Tensor, ...]:
        q, k, v = rows
        args = self.args
        if args.rotary_dim:
            key = ("rotation", args.rotary_dim, args.rope_theta, q.dtype)
            rotation = clock.derived(key, lambda seen_n: Rotation(seen_n, args.rotary_dim, args.rope_theta, q.dtype))
            q, k = self._rotated(q, rotation), self._rotated(k, rotation)
        return (decoding.attend(q, k, v),)

    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        out = mixed[0].flatten(1)
        if self.args.output_gate:
            out = out * self.g_proj(x_TD).sigmoid()
        return self.o_proj(out)

    def _with_positions(self, rows, cu_seqlens, seen: Sequence[int]) -> tuple[torch.Tensor, ...]:
        q, k, v = rows
        args = self.args
        if not args.rotary_dim:
            return q, k, v
        rotation = rotation_of(tuple(cu_seqlens), tuple(seen), args.rotary_dim, args.rope_theta, q.dtype, q.device)
        return self._rotated(q, rotation), self._rotated(k, rotation), v

    def _rotated(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        turned = self.args.rotary_dim
        if turned == x.shape[-1]:
            return rotation.apply(x)
        first, rest = x.split([turned, x.shape[-1] - turned], -1)
        return torch.cat([rotation.apply(first), rest], -1)
