"""LaCT's sequence mixer.

Legend: T tokens, D hidden channels, N sequences, A attention heads, E channels of one, H fast heads, F channels of one, W window,
L learning rates of a fast weight.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_kernels.lact import FastWeights, FixedState, LaCTState, WritingTokens, WrittenSums, fixed_states, lact, unit_vectors
from refine_kernels.packing import PlannedTensor, cached_plan
from refine_kernels.past_tokens import LastTokens, host_tensor
from refine_kernels.rotary import Rotation
from refine_kernels.sliding_window import WindowedAttention, sliding_window_attention
from refine_titan.models.context_shard import ContextShard, rows_before, tied
from refine_titan.models.decoder import initialize
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.lact.args import LaCTArgs
from refine_titan.models.lact.decoding import LaCTDecoding
from refine_titan.models.lact.shard import lact_of_shard
from refine_titan.models.rotation import rotation_of
from refine_titan.models.sharded_tensors import FullWidthRMSNorm, local
from refine_titan.models.shared_prefix import Entries, LayerState, SharedPrefixMixer, StateShape, split_arrival

BASE_LEARNING_RATE = 0.001
NORM_EPS = 1e-5
NAMES = FastWeights._fields


class LowRankFastWeight(nn.Module):
    """An initial fast weight `left @ right + I / 2`, `[heads, rows, columns]`."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float):
        super().__init__()
        self.gain = gain
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank, dtype=torch.float32))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.w_left.device.type, enabled=False):
            weight = local(self.w_left) @ local(self.w_right)
        return weight + _half_identity(*weight.shape[1:]).on(weight.device)

    def reset_mixer_parameters(self) -> None:
        for parameter in (self.w_left, self.w_right):
            std = self.gain / math.sqrt(parameter.shape[-1])
            initialize(parameter, lambda weight, std=std: nn.init.normal_(weight, std=std))


class InitialFastWeights(nn.Module):
    """The weights that every sequence's fast network starts with. They are float32 whatever the model computes in, like the states that
    they turn into."""

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
    """Sliding-window attention plus a fast network per head, both on the same q, k and v."""

    tensor_parallel_plan = {
        "q_proj": "columns",
        "k_proj": "columns",
        "v_proj": "columns",
        "q_norm": "first_dim",
        "k_norm": "first_dim",
        "qk_scale": "first_dim",
        "qk_offset": "first_dim",
        "fast_weights": "first_dim",
        "lr_proj": "columns",
        "momentum_proj.0": "columns",
        "ttt_scale_proj": "columns",
        "ttt_norm": "heads",
        "o_proj": "rows",
    }
    step_can_be_recorded = True
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
        """Queries, keys and values of attention and then of the fast network, without positions; learning rates; momentum, if any."""
        args = self.args
        q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        if args.attn_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale, offset = local(self.qk_scale).to(q.dtype), local(self.qk_offset).to(q.dtype)
        (q_scale, k_scale), (q_offset, k_offset) = (x.unflatten(0, (-1, args.fast_dim)).unbind(-1) for x in (scale, offset))
        fast_q, fast_k, fast_v = (x.unflatten(-1, (-1, args.fast_dim)) for x in (q, k, v))
        fast_q = unit_vectors(fast_q, q_scale, q_offset, silu=args.qkv_silu)
        fast_k = unit_vectors(fast_k, k_scale, k_offset, silu=args.qkv_silu)
        if args.qkv_silu and not args.no_v_silu:
            fast_v = F.silu(fast_v)
        attention = [x.unflatten(-1, (-1, args.head_dim)) for x in (q, k, v)]
        lr = self.lr_proj(x_TD)
        lr = F.softplus(lr.to(torch.promote_types(lr.dtype, torch.float32)) + _inverse_softplus(BASE_LEARNING_RATE))
        rows = (*attention, fast_q, fast_k, fast_v, lr.unflatten(-1, (-1, 3, args.lr_dim)))
        return (*rows, self.momentum_proj(x_TD)) if args.use_momentum else rows

    def bytes_read_per_token(self, compute_dtype: torch.dtype, seen: int) -> int:
        """Bytes of the weights, in the precision of their products, and of the window."""
        shapes = self.state_shapes(compute_dtype)
        names = (*(f"fast_{name}" for name in NAMES), "keys", "values")
        return sum(math.prod(shapes[name].shape) for name in names) * compute_dtype.itemsize

    def fixed_size(self, state: LayerState) -> LayerState:
        """The state with the updates of its chunk's tokens summed up."""
        past = self._past(state)
        fixed = fixed_states(
            past,
            self.fast_weights(),
            chunk_size=self.args.chunk_size,
            prenorm=self.args.ttt_prenorm,
            compute_dtype=_last_tokens(state.tensors["keys"]).pool.dtype,
        )
        tensors = {"seen": past.seen, "keys": state["keys"], "values": state["values"]}
        for prefix, weights in (("fast", fixed.weights), ("momentum", fixed.momentum), ("pending", fixed.sums)):
            if weights is not None:
                tensors |= {f"{prefix}_{name}": getattr(weights, name) for name in NAMES}
        if fixed.momentum_sums is not None:
            tensors["pending_momentum"] = fixed.momentum_sums
        return LayerState(tensors)

    def mix(self, rows, cu_seqlens, initial_state: LayerState | None, state_positions):
        past = None if initial_state is None else self._past(initial_state)
        seen = [] if past is None else past.seen.tolist()
        windows = None if past is None else tuple(_last_tokens(initial_state.tensors[name]) for name in ("keys", "values"))
        q, k, v, *fast_rows = self._with_positions(rows, cu_seqlens, seen)
        attended = sliding_window_attention(
            q, k, v, cu_seqlens, self.args.window_size, past=windows, past_lengths=seen, window_positions=state_positions
        )
        initial = self.fast_weights()
        fast_out, states = self._run_lact(fast_rows, initial, cu_seqlens, past, state_positions)
        reads_keys = any(seen) and self.args.window_size > 1
        unread_keys = () if windows is None or reads_keys else (windows[0].pool,)
        attended, fast_out = self._with_all_gradients(attended, fast_out, rows, (*initial, *unread_keys), state_positions)
        return (attended.out_THD, fast_out), self._state(attended, states)

    def begin_decoding(self, state: LayerState, clock: DecodingClock, into: LaCTDecoding | None = None) -> LaCTDecoding:
        decoding = into or LaCTDecoding(clock, self._advance, chunk_size=self.args.chunk_size, prenorm=self.args.ttt_prenorm)
        window = tuple(_last_tokens(state.tensors[name]) for name in ("keys", "values"))
        # FSDP2 gathers the initial weights on every rank alike: here, not where a chunk ends.
        decoding.load(window, self._past(state), self.fast_weights())
        return decoding

    def step(self, rows, decoding: LaCTDecoding, clock: DecodingClock) -> tuple[torch.Tensor, ...]:
        args, dtype = self.args, rows[0].dtype
        key = ("rotation", args.head_dim, args.rope_theta, dtype)
        rotation = clock.derived(key, lambda seen_n: Rotation(seen_n, args.head_dim, args.rope_theta, dtype))
        q, k, v, fast_q, *writing = self._rotated(rows, rotation)
        mixed = decoding.attend(q, k, v), decoding.apply(fast_q)
        decoding.write(WritingTokens(*writing))
        return mixed

    def _advance(self, rows: WritingTokens, initial: FastWeights, past: LaCTState) -> LaCTState:
        """The state of one sequence after further tokens, of which only what they write is given."""
        length = rows.k.shape[0]
        return self._run_lact((None, *rows), initial, (0, length), past, (length,))[1]

    def mix_shard(self, rows, cu_seqlens, shard: ContextShard, state_positions):
        seen = [shard.seen]
        q, k, v, *fast_rows = self._with_positions(rows, cu_seqlens, seen)
        reach = self.args.window_size - 1
        keys, values = rows_before(torch.stack([k[k.shape[0] - reach :], v[v.shape[0] - reach :]]), shard)
        inside, order = split_arrival(state_positions)
        attended = sliding_window_attention(
            q,
            k,
            v,
            cu_seqlens,
            self.args.window_size,
            past=(LastTokens.of_batch(keys[None]), LastTokens.of_batch(values[None])),
            past_lengths=seen,
            window_positions=inside,
        )
        # The window on arrival stands right before the shard's own keys.
        ends = torch.cat([host_tensor([min(shard.seen, reach)]), attended.keys.end])[order]
        attended = WindowedAttention(
            tied(attended.out_THD, keys, values), attended.keys._replace(end=ends), attended.values._replace(end=ends)
        )
        initial = self.fast_weights()
        fast_out, states = lact_of_shard(
            self._run_lact,
            tuple(fast_rows),
            initial,
            cu_seqlens,
            shard,
            state_positions,
            chunk_size=self.args.chunk_size,
            prenorm=self.args.ttt_prenorm,
        )
        attended, fast_out = self._with_all_gradients(attended, fast_out, rows, initial, state_positions)
        if state_positions:
            # Where a loss reaches the states only, the exchange would have no backward on the ranks whose states do not need it.
            attended = _with_tied_keys(attended, attended.out_THD, fast_out)
        return (attended.out_THD, fast_out), self._state(attended, states)

    def _run_lact(self, rows, initial, cu_seqlens, past: LaCTState | None, state_positions):
        """Runs the fast networks; `rows` are queries, keys, values, learning rates, and momentum or None."""
        return lact(
            *rows,
            initial,
            cu_seqlens,
            chunk_size=self.args.chunk_size,
            muon=self.args.use_muon,
            muon_joins=self.args.use_fused_kernel,
            prenorm=self.args.ttt_prenorm,
            newton_schulz_dtype=getattr(torch, self.args.newton_schulz_dtype),
            past=past,
            state_positions=state_positions,
        )

    def _with_positions(self, rows, cu_seqlens, seen: list[int]) -> tuple[torch.Tensor | None, ...]:
        """The rows of `project` with rotary positions where they belong, and None for no momentum."""
        dtype, device = rows[0].dtype, rows[0].device
        rotation = rotation_of(tuple(cu_seqlens), tuple(seen), self.args.head_dim, self.args.rope_theta, dtype, device)
        return self._rotated(rows, rotation)

    def _rotated(self, rows, rotation: Rotation) -> tuple[torch.Tensor | None, ...]:
        """The same with the given rotary positions."""
        q, k, v, fast_q, fast_k, fast_v, lr_TH3L, *momentum = rows
        if not self.args.ttt_nope:
            # In heads as wide as those of attention, even where the heads of the fast network are wider.
            fast_q, fast_k = (
                rotation.apply(x.flatten(1).unflatten(1, (-1, self.args.head_dim))).flatten(1).view_as(x) for x in (fast_q, fast_k)
            )
        return rotation.apply(q), rotation.apply(k), v, fast_q, fast_k, fast_v, lr_TH3L, momentum[0] if momentum else None

    def _with_all_gradients(
        self, attended: WindowedAttention, fast_out: torch.Tensor, rows, given: Sequence[torch.Tensor], state_positions
    ) -> tuple[WindowedAttention, torch.Tensor]:
        """Puts everything that a pass was given into the graph of its results, also what it did not read.

        Not read are: learning rates and momenta where no chunk ends; initial weights where all sequences go on from a state; of that
        state, what has been written since a border. Their gradient has to be zero, not missing: FSDP2 gathers parameters and reduces
        gradients as backward meets them, and that must be the same ones, in the same order, on every rank. All of a state is therefore
        tied to its keys. A pass that goes on from the state has the keys in its graph: it reads them, or they are tied to its results
        where there is nothing to read (a window of one token; sequences that have read nothing).

        Args:
            rows: what `project` gave.
            given: the initial weights, and the past keys if attention did not read them.
        """
        if not torch.is_grad_enabled():
            return attended, fast_out
        if state_positions:
            attended = _with_tied_keys(attended, *rows[4:], *given)
        return attended, tied(fast_out, *rows[6:], *given)

    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        attended, fast = mixed
        fast = self.ttt_norm(fast)
        if self.args.learnable_ttt_scale:
            fast = fast * F.silu(self.ttt_scale_proj(x_TD))[..., None]
        return self.o_proj(attended.flatten(1) + fast.flatten(1))

    def _past(self, state: LayerState) -> LaCTState:
        """The operator's state from a state that a pass returned, or from one of fixed size."""
        has_momentum, tensors = self.args.use_momentum, state.tensors

        def entries(prefix: str) -> tuple[tuple[FastWeights, ...], torch.Tensor]:
            parts = [_entries(tensors[f"{prefix}_{name}"]) for name in NAMES]
            return tuple(map(FastWeights, *(part.values for part in parts))), parts[0].index

        if "chunk_k" not in tensors:
            groups = (("fast", True), ("momentum", has_momentum), ("pending", True))
            weights = [FastWeights(*(state[f"{p}_{name}"] for name in NAMES)) if has else None for p, has in groups]
            fixed = FixedState(*weights, state["pending_momentum"] if has_momentum else None)
            return LaCTState.of_fixed(state["seen"].tolist(), fixed, self.args.chunk_size)
        weights, version = entries("fast")
        sums, sum_of = (), host_tensor([0] * len(version))
        if "pending_w0" in tensors:
            written, sum_of = entries("pending")
            momenta = _entries(tensors["pending_momentum"]).values if has_momentum else [None] * len(written)
            sums = tuple(map(WrittenSums, written, momenta))
        names = (f"chunk_{name}" for name in WritingTokens._fields)
        rows = [_last_tokens(tensors[name]) if name in tensors else None for name in names]
        return LaCTState(
            seen=state["seen"],
            version=version,
            weights=weights,
            momentum=entries("momentum")[0] if has_momentum else None,
            num_summed=state["num_summed"],
            sum_of=sum_of,
            sums=sums,
            token_end=rows[0].end,
            tokens=WritingTokens(*(None if x is None else x.pool for x in rows)),
        )

    def _state(self, attended: WindowedAttention, states: LaCTState) -> LayerState:
        """The states at the positions: tokens read, window of keys and values, fast weights, and what the chunk's tokens write."""
        tensors = {"seen": states.seen, "num_summed": states.num_summed, "keys": attended.keys, "values": attended.values}
        groups = [("fast", states.weights, states.version), ("momentum", states.momentum, states.version)]
        if states.sums:
            groups.append(("pending", tuple(s.weights for s in states.sums), states.sum_of))
            if states.momentum is not None:
                tensors["pending_momentum"] = Entries(tuple(s.momentum for s in states.sums), states.sum_of)
        for prefix, weights, index in groups:
            for name in NAMES if weights is not None else ():
                tensors[f"{prefix}_{name}"] = Entries(tuple(getattr(w, name) for w in weights), index)
        for name, pool in states.tokens._asdict().items():
            if pool is not None:
                tensors[f"chunk_{name}"] = LastTokens(pool, states.token_end, self.args.chunk_size - 1)
        return LayerState(tensors)

    def reset_mixer_parameters(self) -> None:
        initialize(self.qk_scale, nn.init.ones_)
        initialize(self.qk_offset, nn.init.zeros_)


@cached_plan(maxsize=4)
def _half_identity(rows: int, columns: int) -> PlannedTensor:
    return PlannedTensor(0.5 * torch.eye(rows, columns, dtype=torch.float32))


def _last_tokens(x: torch.Tensor | LastTokens) -> LastTokens:
    return x if isinstance(x, LastTokens) else LastTokens.of_batch(x)


def _entries(x: torch.Tensor | Entries) -> Entries:
    """A batch as entries, each of which one sequence has."""
    return x if isinstance(x, Entries) else Entries(x.unbind(), host_tensor(range(x.shape[0])))


def _with_tied_keys(attended: WindowedAttention, *others: torch.Tensor) -> WindowedAttention:
    """The same with the others in the graph of its window's keys."""
    return attended._replace(keys=attended.keys._replace(pool=tied(attended.keys.pool, *others)))


def _inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))
