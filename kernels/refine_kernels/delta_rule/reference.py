"""The delta rule in plain torch: token by token (the definition) and in chunks (fast enough for a CPU).

Legend: T rows, N sequences, H heads, K key and V value channels, C chunk length, G chunks, P state positions.
"""

import functools
from dataclasses import dataclass

import torch

from refine_kernels.packing import check_packing, sequence_of_token

CHUNK_SIZE = 64


def recurrent_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, *, initial_state_NHKV=None, state_positions=()):
    """The definition, one row at a time. Same contract as `refine_kernels.delta_rule.delta_rule`."""
    check_packing(cu_seqlens, q_THK.shape[0], state_positions)
    H, K, V = q_THK.shape[1], q_THK.shape[2], v_THV.shape[2]
    dtype = _state_dtype(q_THK)
    q, k, v, beta = (x.to(dtype) for x in (q_THK, k_THK, v_THV, beta_TH))
    q = q * K**-0.5
    outputs, state_after = [], {}
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        state = q.new_zeros(H, K, V) if initial_state_NHKV is None else initial_state_NHKV[n].to(dtype)
        for t in range(start, end):
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
            state_after[t + 1] = state
    states = [state_after[r] for r in state_positions]
    return torch.stack(outputs).to(v_THV.dtype), torch.stack(states) if states else q.new_zeros(0, H, K, V)


def chunked_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, *, initial_state_NHKV=None, state_positions=()):
    """The same in chunks of at most 64 rows (WY form, README.md). Contract as `refine_kernels.delta_rule.delta_rule`.

    All sequences advance together, one chunk at a time, so that many short sequences cost one step. The state at a
    position inside a chunk follows from the chunk's own update rows: no row is computed twice for it. The arithmetic is
    float32 under autocast too, which would otherwise run the matrix products in bfloat16.
    """
    with torch.autocast(q_THK.device.type, enabled=False):
        return _chunked(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, initial_state_NHKV, state_positions)


def _chunked(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, initial_state_NHKV, state_positions):
    T, H, K = q_THK.shape
    V = v_THV.shape[2]
    plan = _plan_chunks(tuple(cu_seqlens), T, tuple(state_positions))
    C, G = plan.chunk_size, plan.num_chunks
    dtype, device = _state_dtype(q_THK), q_THK.device

    slot_of_row = None if plan.slot_of_row is None else plan.slot_of_row.to(device)

    def to_chunks(x_THD):
        x_THD = x_THD.to(dtype)
        if slot_of_row is not None:
            x_THD = x_THD.new_zeros(G * C, *x_THD.shape[1:]).index_copy(0, slot_of_row, x_THD)
        return x_THD.reshape(G, C, H, -1).transpose(1, 2)

    q, k, v = to_chunks(q_THK) * K**-0.5, to_chunks(k_THK), to_chunks(v_THV)
    beta = to_chunks(beta_TH[..., None])
    k_beta = k * beta
    lower = (k_beta @ k.mT).tril(-1) + torch.eye(C, dtype=dtype, device=device)
    w_u = torch.linalg.solve_triangular(lower, torch.cat([k_beta, v * beta], -1), upper=False, unitriangular=True)
    w, u = w_u.split([K, V], -1)

    # The only sequential part: every sequence's state from chunk to chunk, longest sequences first.
    num_sequences = len(cu_seqlens) - 1
    if initial_state_NHKV is None:
        state = q.new_zeros(num_sequences, H, K, V)
    else:
        order = torch.tensor(plan.sequence_order, device=device)
        state = initial_state_NHKV.to(dtype).index_select(0, order)
    w_levels, u_levels, k_levels = (x.split(plan.level_sizes) for x in (w, u, k))
    states_before, states_after, updates = [], [], []
    for w_level, u_level, k_level in zip(w_levels, u_levels, k_levels):
        state = state[: w_level.shape[0]]
        update = u_level - w_level @ state
        states_before.append(state)
        updates.append(update)
        state = state + k_level.mT @ update
        states_after.append(state)
    state_before, update = torch.cat(states_before), torch.cat(updates)
    out = q @ state_before + (q @ k.mT).tril() @ update

    out_THV = out.transpose(1, 2).reshape(G * C, H, V)
    if slot_of_row is not None:
        out_THV = out_THV.index_select(0, slot_of_row)
    states = _states_at(plan, state_before, states_after, k, update)
    return out_THV.to(v_THV.dtype), states


@dataclass(frozen=True)
class _ChunkPlan:
    """Where rows, chunks and wanted states lie. Chunks are ordered by level: the first chunks of all sequences
    (longest sequence first), then the second chunks of those that have one, and so on."""

    chunk_size: int
    level_sizes: list[int]
    sequence_order: list[int]
    slot_of_row: torch.Tensor | None  # None where row t lies in slot t
    state_level: list[int]  # per state position: level and rank of the chunk that holds its last row, and
    state_rank: list[int]
    state_chunk: list[int]
    state_rows: list[int]  # how many rows of that chunk it has seen

    @property
    def num_chunks(self) -> int:
        return sum(self.level_sizes)


@functools.lru_cache(maxsize=64)
def _plan_chunks(cu_seqlens: tuple[int, ...], num_rows: int, state_positions: tuple[int, ...]) -> _ChunkPlan:
    check_packing(cu_seqlens, num_rows, state_positions)
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    C = min(CHUNK_SIZE, max(lengths))
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

    levels, ranks, chunks, rows = [], [], [], []
    for r in state_positions:
        n = sequence_of_token(cu_seqlens, r - 1)
        p = r - 1 - cu_seqlens[n]
        levels.append(p // C)
        ranks.append(rank[n])
        chunks.append(first_chunk[p // C] + rank[n])
        rows.append(p % C + 1)
    slot_of_row = None if is_identity else torch.tensor(slots)
    return _ChunkPlan(C, level_sizes, order, slot_of_row, levels, ranks, chunks, rows)


def _states_at(plan, state_before_GHKV, states_after, k_GHCK, update_GHCV):
    """States at the plan's positions: a chunk's end state where the position ends a chunk, else the state before the
    chunk plus the outer products of its first rows."""
    states: list[torch.Tensor | None] = [None] * len(plan.state_rows)
    inside = [i for i, rows in enumerate(plan.state_rows) if rows < plan.chunk_size]
    for i, rows in enumerate(plan.state_rows):
        if rows == plan.chunk_size:
            states[i] = states_after[plan.state_level[i]][plan.state_rank[i]]
    if inside:
        device = k_GHCK.device
        chunks = torch.tensor([plan.state_chunk[i] for i in inside], device=device)
        rows = torch.tensor([plan.state_rows[i] for i in inside], device=device)
        seen = torch.arange(plan.chunk_size, device=device) < rows[:, None]
        k = k_GHCK.index_select(0, chunks) * seen[:, None, :, None]
        partial = state_before_GHKV.index_select(0, chunks) + k.mT @ update_GHCV.index_select(0, chunks)
        for i, state in zip(inside, partial.unbind(0)):
            states[i] = state
    return torch.stack(states) if states else state_before_GHKV.new_zeros(0, *state_before_GHKV.shape[1:])


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
