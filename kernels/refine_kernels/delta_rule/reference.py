"""The delta rule in plain torch: token by token (the definition) and in chunks (fast enough for a CPU).

Legend: T tokens, N sequences, H heads, K key and V value channels, C chunk length, G chunks, P state positions.
"""

from dataclasses import dataclass

import torch

from refine_kernels.packing import PlannedTensor, cached_plan, check_packing, sequence_of_token

CHUNK_SIZE = 64
# With a decay per key channel the products inside a chunk take [C, C, K] numbers.
CHANNEL_DECAY_CHUNK_SIZE = 16


def recurrent_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, *, log_decay=None, initial_state_NHKV=None, state_positions=()):
    """The definition, one token at a time. Same contract as `refine_kernels.delta_rule.delta_rule`."""
    check_packing(cu_seqlens, q_THK.shape[0], state_positions)
    dtype = _state_dtype(q_THK)
    q, k, v, beta = (x.to(dtype) for x in (q_THK, k_THK, v_THV, beta_TH))
    q, k = _one_per_value_head(q, v), _one_per_value_head(k, v)
    H, K, V = *q.shape[1:], v.shape[2]
    q = q * K**-0.5
    decay = None if log_decay is None else _with_channels(log_decay).to(dtype).exp()
    outputs, state_after = [], {}
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        state = q.new_zeros(H, K, V) if initial_state_NHKV is None else initial_state_NHKV[n].to(dtype)
        for t in range(start, end):
            if decay is not None:
                state = state * decay[t][..., None]
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
            state_after[t + 1] = state
    states = [state_after[r] for r in state_positions]
    return torch.stack(outputs).to(v_THV.dtype), torch.stack(states) if states else q.new_zeros(0, H, K, V)


def chunked_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, *, log_decay=None, initial_state_NHKV=None, state_positions=()):
    """The delta rule in chunks of at most 64 tokens (WY form, README.md). Same contract as `refine_kernels.delta_rule.delta_rule`.

    All sequences advance together, one chunk at a time, so that many short sequences cost one step. The state at a
    position inside a chunk follows from the chunk's updates: no token is computed twice for it. Autocast is switched off,
    because it would run the matrix products in bfloat16; the arithmetic is float32, or float64 for float64 inputs.
    """
    with torch.autocast(q_THK.device.type, enabled=False):
        return _chunked(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, log_decay, initial_state_NHKV, state_positions)


def _chunked(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, log_decay, initial_state_NHKV, state_positions):
    q_THK, k_THK = _one_per_value_head(q_THK, v_THV), _one_per_value_head(k_THK, v_THV)
    T, H, K = q_THK.shape
    V = v_THV.shape[2]
    longest_chunk = CHUNK_SIZE if log_decay is None or log_decay.dim() == 2 else CHANNEL_DECAY_CHUNK_SIZE
    plan = _plan_chunks(tuple(cu_seqlens), T, tuple(state_positions), longest_chunk)
    C, G = plan.chunk_size, plan.num_chunks
    dtype, device = _state_dtype(q_THK), q_THK.device

    slot_of_token = None if plan.slot_of_token is None else plan.slot_of_token.on(device)

    def to_chunks(x_THD):
        x_THD = x_THD.to(dtype)
        if slot_of_token is not None:
            x_THD = x_THD.new_zeros(G * C, *x_THD.shape[1:]).index_copy(0, slot_of_token, x_THD)
        return x_THD.reshape(G, C, H, -1).transpose(1, 2)

    q, k, v = to_chunks(q_THK) * K**-0.5, to_chunks(k_THK), to_chunks(v_THV)
    beta = to_chunks(beta_TH[..., None])
    decay = _Decay(None if log_decay is None else to_chunks(_with_channels(log_decay)))
    products_kk, products_qk = decay.products(k, q)
    lower = (products_kk * beta).tril(-1) + torch.eye(C, dtype=dtype, device=device)
    right = torch.cat([decay.read(k) * beta, v * beta], -1)
    w_u = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    w, u = w_u.split([K, V], -1)

    # The only sequential part: the state of every sequence from chunk to chunk, longest sequences first.
    num_sequences = len(cu_seqlens) - 1
    if initial_state_NHKV is None:
        state = q.new_zeros(num_sequences, H, K, V)
    else:
        order = torch.tensor(plan.sequence_order, device=device)
        state = initial_state_NHKV.to(dtype).index_select(0, order)
    w_levels, u_levels, k_levels = (x.split(plan.level_sizes) for x in (w, u, decay.written(k)))
    kept_levels = decay.kept_at_end(plan.level_sizes)
    states_before, states_after, updates = [], [], []
    for w_level, u_level, k_level, kept in zip(w_levels, u_levels, k_levels, kept_levels):
        state = state[: w_level.shape[0]]
        update = u_level - w_level @ state
        states_before.append(state)
        updates.append(update)
        state = (state if kept is None else state * kept) + k_level.mT @ update
        states_after.append(state)
    state_before, update = torch.cat(states_before), torch.cat(updates)
    out = decay.read(q) @ state_before + products_qk.tril() @ update

    out_THV = out.transpose(1, 2).reshape(G * C, H, V)
    if slot_of_token is not None:
        out_THV = out_THV.index_select(0, slot_of_token)
    states = _states_at(plan, state_before, states_after, k, update, decay)
    return out_THV.to(v_THV.dtype), states


class _Decay:
    """Decay factors inside the chunks, from log decays `[G, H, C, 1 or K]`, or None for no decay.

    `between` `[G, H, C, C, 1 or K]` is the factor by which what token j writes has decayed at token i >= j (1 for i < j).
    Each exponent is a sum that starts after token j. A difference of two sums from the chunk's start, which strong decays
    drive into the hundreds, would lose the digits that the gradient depends on. `since_start` `[G, H, C, 1 or K]` is the
    factor from the chunk's start to token i.
    """

    def __init__(self, log_decay: torch.Tensor | None):
        self.is_none = log_decay is None
        if log_decay is not None:
            C = log_decay.shape[2]
            after = torch.ones(C, C, dtype=torch.bool, device=log_decay.device).tril(-1)[..., None]
            # The running sum over tokens is a product with a triangle of ones: torch's cumsum is slow along any dim but the last.
            until = torch.ones(C, C, dtype=log_decay.dtype, device=log_decay.device).tril()
            summed = until @ (log_decay[:, :, :, None] * after).flatten(3)
            self.between = summed.unflatten(3, (C, -1)).exp()
            self.since_start = log_decay.cumsum(2).exp()

    def products(self, k: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sum_c k_ic k_jc` and `sum_c q_ic k_jc`, each term times the decay of channel c from j to i, `[G, H, C, C]`; entries
        above the diagonal are finite and mean nothing."""
        if self.is_none:
            return k @ k.mT, q @ k.mT
        if self.between.shape[-1] == 1:
            kept = self.between.squeeze(-1)
            return (k @ k.mT) * kept, (q @ k.mT) * kept
        return ((self.between * k[:, :, None]) @ torch.stack([k, q], -1)).unbind(-1)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors that read the state before the chunk, times the decay of that state at their token."""
        return x if self.is_none else x * self.since_start

    def written(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors that are written to the state, times their decay at the chunk's end."""
        return x if self.is_none else x * self.between[:, :, -1]

    def kept_at_end(self, sizes: list[int]) -> list[torch.Tensor | None]:
        """Decay of the state before the chunk at the chunk's end, `[chunks, H, 1 or K, 1]`, chunks split by level."""
        if self.is_none:
            return [None] * len(sizes)
        return list(self.since_start[:, :, -1, :, None].split(sizes))

    def at(self, chunks: torch.Tensor, num_read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decay of the state before each of P chunks, `[P, H, 1 or K, 1]`, and of what the chunk's tokens write,
        `[P, H, C, 1 or K]`, after `num_read` tokens of the chunk."""
        return self.since_start[chunks, :, num_read - 1][..., None], self.between[chunks, :, num_read - 1]


@dataclass(frozen=True)
class _ChunkPlan:
    """The places of tokens, chunks and wanted states. Chunks are ordered by level: the first chunks of all sequences
    (longest sequence first), then the second chunks of those that have one, and so on.

    Attributes:
        slot_of_token: index of each token in the padded chunks, `[T]`; None if token t lies in slot t.
        state_level, state_rank: level, and rank within the level, of the chunk that holds the last token of each state position.
        state_chunk: index of that chunk.
        state_tokens: number of tokens of that chunk that the state has read.
    """

    chunk_size: int
    level_sizes: list[int]
    sequence_order: list[int]
    slot_of_token: PlannedTensor | None
    state_level: list[int]
    state_rank: list[int]
    state_chunk: list[int]
    state_tokens: list[int]

    @property
    def num_chunks(self) -> int:
        return sum(self.level_sizes)


@cached_plan(maxsize=64)
def _plan_chunks(cu_seqlens: tuple[int, ...], num_tokens: int, state_positions: tuple[int, ...], longest_chunk: int) -> _ChunkPlan:
    check_packing(cu_seqlens, num_tokens, state_positions)
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    C = min(longest_chunk, max(lengths))
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    rank = {n: r for r, n in enumerate(order)}
    level_sizes = []
    while any(length > len(level_sizes) * C for length in lengths):
        level_sizes.append(sum(length > len(level_sizes) * C for length in lengths))
    first_chunk = [sum(level_sizes[:level]) for level in range(len(level_sizes))]

    slots = []
    for n, length in enumerate(lengths):
        for p in range(length):
            slots.append((first_chunk[p // C] + rank[n]) * C + p % C)
    is_identity = len(slots) == sum(level_sizes) * C and slots == list(range(len(slots)))

    levels, ranks, chunks, tokens = [], [], [], []
    for r in state_positions:
        n = sequence_of_token(cu_seqlens, r - 1)
        p = r - 1 - cu_seqlens[n]
        levels.append(p // C)
        ranks.append(rank[n])
        chunks.append(first_chunk[p // C] + rank[n])
        tokens.append(p % C + 1)
    slot_of_token = None if is_identity else PlannedTensor(torch.tensor(slots))
    return _ChunkPlan(C, level_sizes, order, slot_of_token, levels, ranks, chunks, tokens)


def _states_at(plan, state_before_GHKV, states_after, k_GHCK, update_GHCV, decay):
    """States at the plan's positions. A position at the end of a chunk takes the state after the chunk; a position inside
    takes the decayed state before the chunk plus the decayed outer products of the chunk's first tokens."""
    states: list[torch.Tensor | None] = [None] * len(plan.state_tokens)
    inside = [i for i, num_read in enumerate(plan.state_tokens) if num_read < plan.chunk_size]
    for i, num_read in enumerate(plan.state_tokens):
        if num_read == plan.chunk_size:
            states[i] = states_after[plan.state_level[i]][plan.state_rank[i]]
    if inside:
        device = k_GHCK.device
        chunks = torch.tensor([plan.state_chunk[i] for i in inside], device=device)
        num_read = torch.tensor([plan.state_tokens[i] for i in inside], device=device)
        is_read = (torch.arange(plan.chunk_size, device=device) < num_read[:, None])[:, None, :, None]
        k, before = k_GHCK.index_select(0, chunks), state_before_GHKV.index_select(0, chunks)
        if not decay.is_none:
            kept_before, kept_written = decay.at(chunks, num_read)
            k, before = k * kept_written, before * kept_before
        partial = before + (k * is_read).mT @ update_GHCV.index_select(0, chunks)
        for i, state in zip(inside, partial.unbind(0)):
            states[i] = state
    return torch.stack(states) if states else state_before_GHKV.new_zeros(0, *state_before_GHKV.shape[1:])


def _one_per_value_head(x_THK: torch.Tensor, v_THV: torch.Tensor) -> torch.Tensor:
    """Repeats keys or queries that a group of value heads shares, so that every value head has its own."""
    groups = v_THV.shape[1] // x_THK.shape[1]
    return x_THK if groups == 1 else x_THK.repeat_interleave(groups, 1)


def _with_channels(log_decay: torch.Tensor) -> torch.Tensor:
    """Turns `[T, H]` into `[T, H, 1]` and leaves `[T, H, K]` unchanged."""
    return log_decay if log_decay.dim() == 3 else log_decay[..., None]


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
