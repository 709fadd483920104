"""LaCT's sequence mixer.

Legend: T rows, D hidden channels, N sequences, A attention heads, E channels of one, H fast heads, F channels of one, W window,
L learning rates of a fast weight.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_kernels.lact import FastWeights, LaCTState, lact
from refine_kernels.packing import sequence_of_token
from refine_kernels.sliding_window import WindowedAttention, sliding_window_attention
from refine_titan.models.context_shard import ContextShard, rows_before, tied
from refine_titan.models.decoder import initialize
from refine_titan.models.lact.args import LaCTArgs
from refine_titan.models.lact.shard import lact_of_shard
from refine_titan.models.rotary import Rotation
from refine_titan.models.sharded_tensors import FullWidthRMSNorm, local
from refine_titan.models.shared_prefix import IndexedRows, LayerState, SharedPrefixMixer, StateShape

BASE_LEARNING_RATE = 0.001
NORM_EPS = 1e-5
NAMES = FastWeights._fields


class LowRankFastWeight(nn.Module):
    """Initial fast weight `left @ right + I / 2`, `[heads, rows, columns]`."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float):
        super().__init__()
        self.gain = gain
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank, dtype=torch.float32))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.w_left.device.type, enabled=False):
            weight = local(self.w_left) @ local(self.w_right)
        return weight + 0.5 * torch.eye(*weight.shape[1:], dtype=weight.dtype, device=weight.device)

    def reset_mixer_parameters(self) -> None:
        for parameter in (self.w_left, self.w_right):
            std = self.gain / math.sqrt(parameter.shape[-1])
            initialize(parameter, lambda weight, std=std: nn.init.normal_(weight, std=std))


class InitialFastWeights(nn.Module):
    """The weights that every sequence's fast network starts with; float32 whatever the model computes in, like the states
    that they turn into."""

    keeps_float32 = True

    def __init__(self, args: LaCTArgs):
        super().__init__()
        heads, width, hidden, rank = args.n_fast_heads, args.fast_dim, args.fast_hidden_dim, args.w0_w2_low_rank
        if rank > 0:
            self.w0 = LowRankFastWeight(heads, hidden, width, rank, args.fw_init_gain)
            self.w2 = LowRankFastWeight(heads, hidden, width, rank, args.fw_init_gain)
        else:
            self.w0 = nn.Parameter(torch.empty(heads, hidden, width, dtype=torch.float32))
            self.w2 = nn.Parameter(torch.empty(heads, hidden, width, dtype=torch.float32))
        self.w1 = nn.Parameter(torch.empty(heads, width, hidden, dtype=torch.float32))

    def forward(self) -> FastWeights:
        # Copies: FSDP2 frees a module's gathered parameters when its forward returns.
        w0, w2 = (w() if isinstance(w, LowRankFastWeight) else local(w).clone() for w in (self.w0, self.w2))
        return FastWeights(w0, local(self.w1).clone(), w2)

    def reset_mixer_parameters(self) -> None:
        for weight in (self.w0, self.w1, self.w2):
            if isinstance(weight, nn.Parameter):
                std = 1 / math.sqrt(weight.shape[-1])
                initialize(weight, lambda w, std=std: nn.init.normal_(w, std=std))


class LaCTMixer(SharedPrefixMixer):
    """Sliding-window attention plus a fast network per head, on the same q, k and v."""

    tensor_parallel_plan = {
        "q_proj": "columns", "k_proj": "columns", "v_proj": "columns", "q_norm": "first_dim", "k_norm": "first_dim",
        "qk_scale": "first_dim", "qk_offset": "first_dim", "fast_weights": "first_dim", "lr_proj": "columns",
        "momentum_proj.0": "columns", "ttt_scale_proj": "columns", "ttt_norm": "heads", "o_proj": "rows",
    }  # fmt: skip
    high_precision_projections = ("lr_proj", "momentum_proj", "ttt_scale_proj")

    def __init__(self, args: LaCTArgs):
        super().__init__()
        self.args = args
        heads = args.n_fast_heads
        self.q_proj = nn.Linear(args.dim, args.dim, bias=args.qkv_bias)
        self.k_proj = nn.Linear(args.dim, args.dim, bias=args.qkv_bias)
        self.v_proj = nn.Linear(args.dim, args.dim, bias=args.qkv_bias)
        if args.attn_qk_norm:
            self.q_norm = FullWidthRMSNorm(args.dim, eps=NORM_EPS)
            self.k_norm = FullWidthRMSNorm(args.dim, eps=NORM_EPS)
        self.qk_scale = nn.Parameter(torch.empty(args.dim, 2))
        self.qk_offset = nn.Parameter(torch.empty(args.dim, 2))
        self.fast_weights = InitialFastWeights(args)
        self.lr_proj = nn.Linear(args.dim, 3 * heads * args.lr_dim)
        if args.use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(args.dim, heads), nn.Sigmoid())
        if args.learnable_ttt_scale:
            self.ttt_scale_proj = nn.Linear(args.dim, heads)
        self.ttt_norm = nn.RMSNorm(args.fast_dim, eps=NORM_EPS)
        self.o_proj = nn.Linear(args.dim, args.dim, bias=False)

    def state_shapes(self, compute_dtype: torch.dtype) -> dict[str, StateShape]:
        args, wide = self.args, torch.promote_types(compute_dtype, torch.float32)
        channels = local(self.o_proj.weight).shape[1]
        heads = channels // args.fast_dim
        into_hidden = (heads, args.fast_hidden_dim, args.fast_dim)
        out_of_hidden = (heads, args.fast_dim, args.fast_hidden_dim)
        fast = FastWeights(*(StateShape(shape, wide) for shape in (into_hidden, out_of_hidden, into_hidden)))
        prefixes = ("fast", "pending", "momentum") if args.use_momentum else ("fast", "pending")
        shapes = {f"{prefix}_{name}": getattr(fast, name) for prefix in prefixes for name in NAMES}
        if args.use_momentum:
            shapes["pending_momentum"] = StateShape((heads,), wide)
        window = StateShape((args.window_size - 1, channels // args.head_dim, args.head_dim), compute_dtype)
        return shapes | {"keys": window, "values": window}

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of attention and of the fast network (no positions yet), learning rates, momentum."""
        args = self.args
        q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        if args.attn_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale, offset = local(self.qk_scale).to(q.dtype), local(self.qk_offset).to(q.dtype)
        fast = [q * scale[:, 0] + offset[:, 0], k * scale[:, 1] + offset[:, 1], v]
        if args.qkv_silu:
            fast = [F.silu(fast[0]), F.silu(fast[1]), v if args.no_v_silu else F.silu(v)]
        fast_q, fast_k, fast_v = (x.unflatten(-1, (-1, args.fast_dim)) for x in fast)
        attention = [x.unflatten(-1, (-1, args.head_dim)) for x in (q, k, v)]
        lr = self.lr_proj(x_TD)
        lr = F.softplus(lr.to(torch.promote_types(lr.dtype, torch.float32)) + _inverse_softplus(BASE_LEARNING_RATE))
        rows = (*attention, _normalise(fast_q), _normalise(fast_k), fast_v, lr.unflatten(-1, (-1, 3, args.lr_dim)))
        return (*rows, self.momentum_proj(x_TD)) if args.use_momentum else rows

    def mix(self, rows, cu_seqlens, initial_state: LayerState | None, state_positions):
        seen = [0] * (len(cu_seqlens) - 1) if initial_state is None else initial_state["seen"].tolist()
        q, k, v, *fast_rows = self._with_positions(rows, cu_seqlens, seen)
        attended = sliding_window_attention(
            q, k, v, cu_seqlens, self.args.window_size,
            past=None if initial_state is None else (initial_state["keys"], initial_state["values"]),
            past_lengths=seen,
            window_positions=state_positions,
        )  # fmt: skip
        past = None if initial_state is None else self._past(initial_state)
        initial = self.fast_weights()
        fast_out, states = self._run_lact(fast_rows, initial, cu_seqlens, past, seen, state_positions)
        attended, fast_out = self._with_all_gradients(attended, fast_out, rows, initial, state_positions)
        return (attended.out_THD, fast_out), self._state(cu_seqlens, seen, state_positions, attended, states)

    def mix_shard(self, rows, cu_seqlens, shard: ContextShard, state_positions):
        seen = [shard.seen] + [0] * (len(cu_seqlens) - 2)
        q, k, v, *fast_rows = self._with_positions(rows, cu_seqlens, seen)
        reach = self.args.window_size - 1
        keys, values = rows_before(torch.stack([k[k.shape[0] - reach :], v[v.shape[0] - reach :]]), shard)
        inside = [r for r in state_positions if r > 0]
        attended = sliding_window_attention(
            q, k, v, cu_seqlens, self.args.window_size,
            past=(keys[None], values[None]), past_lengths=seen[:1], window_positions=inside,
        )  # fmt: skip
        # The window on arrival is what stands in front of the shard's own keys.
        windows = torch.cat([torch.arange(reach)[None], attended.window_rows])
        windows = windows[torch.tensor([0 if r == 0 else 1 + inside.index(r) for r in state_positions], dtype=torch.long)]
        attended = attended._replace(out_THD=tied(attended.out_THD, keys, values), window_rows=windows)
        initial = self.fast_weights()
        fast_out, states = lact_of_shard(self._run_lact, tuple(fast_rows), initial, cu_seqlens, shard, state_positions)
        attended, fast_out = self._with_all_gradients(attended, fast_out, rows, initial, state_positions)
        if state_positions:
            # Where only states are gone on from, what ranks exchange would have no backward on those that do not need it.
            attended = attended._replace(keys=tied(attended.keys, attended.out_THD, fast_out))
        return (attended.out_THD, fast_out), self._state(cu_seqlens, seen, state_positions, attended, states)

    def _run_lact(self, rows, initial, cu_seqlens, past, seen: list[int], state_positions):
        """The inner operator. `rows`: queries, keys, values, learning rates, and momentum or None."""
        return lact(
            *rows, initial, cu_seqlens,
            chunk_size=self.args.chunk_size, muon=self.args.use_muon, prenorm=self.args.ttt_prenorm,
            newton_schulz_dtype=getattr(torch, self.args.newton_schulz_dtype),
            past=past, past_lengths=seen, state_positions=state_positions,
        )  # fmt: skip

    def _with_positions(self, rows, cu_seqlens, seen: list[int]) -> tuple[torch.Tensor | None, ...]:
        """The rows of `project` with rotary positions where they belong, and None for no momentum."""
        q, k, v, fast_q, fast_k, fast_v, lr_TH3L, *momentum = rows
        rotation = self._rotation(cu_seqlens, seen, q)
        if not self.args.ttt_nope:
            # The heads of attention, also where those of the fast network are wider.
            fast_q, fast_k = (
                rotation.apply(x.flatten(1).unflatten(1, (-1, self.args.head_dim))).flatten(1).view_as(x)
                for x in (fast_q, fast_k)
            )
        return rotation.apply(q), rotation.apply(k), v, fast_q, fast_k, fast_v, lr_TH3L, momentum[0] if momentum else None

    def _with_all_gradients(
        self, attended: WindowedAttention, fast_out: torch.Tensor, rows, initial: FastWeights, state_positions
    ) -> tuple[WindowedAttention, torch.Tensor]:
        """What attention and the fast network give, with in the graph what it has been made of.

        Where no chunk ends, learning rates and momenta are not read; where all sequences go on from a state, initial weights are
        not; and of a state that is gone on from, what is pending is not. Their gradient has to be zero, not missing: FSDP2
        gathers parameters and reduces gradients as backward meets them, which must be the same ones, in the same order, on
        every rank. The window's keys are the part of a state that whoever goes on from it always reads.
        """
        if not torch.is_grad_enabled():
            return attended, fast_out
        if state_positions:
            attended = attended._replace(keys=tied(attended.keys, *rows[4:], *initial))
        return attended, tied(fast_out, *rows[6:], *initial)

    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        attended, fast = mixed
        fast = self.ttt_norm(fast)
        if self.args.learnable_ttt_scale:
            fast = fast * F.silu(self.ttt_scale_proj(x_TD))[..., None]
        return self.o_proj(attended.flatten(1) + fast.flatten(1))

    def _rotation(self, cu_seqlens, seen: list[int], like: torch.Tensor) -> Rotation:
        spans = zip(seen, cu_seqlens, cu_seqlens[1:])
        positions_T = torch.cat([past + torch.arange(end - start) for past, start, end in spans]).to(like.device)
        return Rotation(positions_T, self.args.head_dim, self.args.rope_theta, like.dtype)

    def _past(self, state: LayerState) -> LaCTState:
        def weights(prefix: str) -> FastWeights:
            return FastWeights(*(state[f"{prefix}_{name}"] for name in NAMES))

        momentum = self.args.use_momentum
        return LaCTState(
            version=None,
            weights=weights("fast"),
            momentum=weights("momentum") if momentum else None,
            pending=weights("pending"),
            pending_momentum=state["pending_momentum"] if momentum else None,
        )

    def _state(self, cu_seqlens, seen, state_positions, attended, states: LaCTState) -> LayerState:
        """Rows read before each position, its window of keys and values, and its fast weights."""
        sequences = [sequence_of_token(cu_seqlens, max(r - 1, 0)) for r in state_positions]
        total = [seen[n] + r - cu_seqlens[n] for n, r in zip(sequences, state_positions)]
        tensors = {
            "seen": torch.tensor(total, dtype=torch.long),
            "keys": IndexedRows(attended.keys, attended.window_rows),
            "values": IndexedRows(attended.values, attended.window_rows),
        }
        for name in NAMES:
            tensors[f"fast_{name}"] = IndexedRows(getattr(states.weights, name), states.version)
            tensors[f"pending_{name}"] = getattr(states.pending, name)
            if states.momentum is not None:
                tensors[f"momentum_{name}"] = IndexedRows(getattr(states.momentum, name), states.version)
        if states.momentum is not None:
            tensors["pending_momentum"] = states.pending_momentum
        return LayerState(tensors)

    def reset_mixer_parameters(self) -> None:
        initialize(self.qk_scale, nn.init.ones_)
        initialize(self.qk_offset, nn.init.zeros_)


def _normalise(x: torch.Tensor) -> torch.Tensor:
    """To unit length, the epsilon added to the length; in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.norm(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


def _inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))
