"""The sequential part of the chunked delta rule in Triton: the state from chunk to chunk, and its gradient back.

Everything else in a chunk is independent of other chunks and left to flash-linear-attention's kernels. These two kernels differ from
flash-linear-attention's own in that they also return the float32 state after any chunk, and take the gradient of that state. README.md
has the maths. A program holds the state of one head and a block of value channels in registers and goes through the chunks of one
sequence.

Legend: T tokens of N packed sequences, H heads of keys, HV of values, K key and V value channels, C chunk size, G chunks of all
sequences, P snapshots. A prefix `b_` marks a block in registers, `o_` offsets of its elements.
"""

import torch
import triton
import triton.language as tl
from fla.utils import autotune_cache_kwargs

# A state of 128 key channels would spill with two warps, and one of 256 with four; blocks of 16 value channels are for the latter.
CONFIGS = [
    *(triton.Config({"BV": width}, num_warps=warps, num_stages=stages) for width in (32, 64) for warps in (4, 8) for stages in (2, 3)),
    *(triton.Config({"BV": 16}, num_warps=8, num_stages=stages) for stages in (2, 3)),
]


# Triton stores the configuration that it chooses beside its compiled kernels, so that a resumed run uses the same one without timing.
TUNING = dict(key=["H", "HV", "K", "V", "USE_G"], **autotune_cache_kwargs)


def fitting(configs: list[triton.Config], arguments: dict, **constants) -> list[triton.Config]:
    """The configurations worth trying for the number of key channels."""
    widths = (16, 32) if (arguments | constants)["BK"] > 128 else (32, 64)
    return [config for config in configs if config.kwargs["BV"] in widths]


@triton.autotune(configs=CONFIGS, prune_configs_by={"early_config_prune": fitting}, **TUNING)
@triton.jit
def _scan_kernel(
    k,
    w,
    u,
    g,
    initial,
    states,
    updates,
    snapshots,
    snapshot_of_chunk,
    cu_seqlens,
    chunk_offsets,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_G: tl.constexpr,
    USE_INITIAL: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    i_v = tl.program_id(0) % blocks
    i_n = (tl.program_id(0) // blocks // HV).to(tl.int64)
    i_h = tl.program_id(0) // blocks % HV
    begin = tl.load(cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - begin).to(tl.int32)
    first_chunk = tl.load(chunk_offsets + i_n).to(tl.int64)

    o_k, o_v, o_c = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_INITIAL:
        state += tl.load(initial + (i_n * HV + i_h) * K * V + o_state, mask=in_state, other=0.0)

    # Addresses inside a chunk are 32-bit offsets from its first token: all tokens of a rank may need 64 bits, those of a chunk never do.
    o_keys = o_c[:, None] * (H * K) + o_k[None, :]
    o_w = o_c[:, None] * (HV * K) + o_k[None, :]
    o_u = o_c[:, None] * (HV * V) + o_v[None, :]
    states += (first_chunk * HV + i_h) * K * V
    snapshot_of_chunk += first_chunk
    k += (begin * H + i_h // (HV // H)) * K
    w += (begin * HV + i_h) * K
    u += (begin * HV + i_h) * V
    updates += (begin * HV + i_h) * V
    if USE_G:
        g += begin * HV + i_h
    snapshots += i_h * K * V

    for i_c in range(0, tl.cdiv(length, C)):
        in_chunk = o_c < length - i_c * C
        in_keys, in_values = in_chunk[:, None] & (o_k < K)[None, :], in_chunk[:, None] & (o_v < V)[None, :]
        tl.store(states + o_state, state.to(states.dtype.element_ty), mask=in_state)
        b_w = tl.load(w + o_w, mask=in_keys, other=0.0)
        b_u = tl.load(u + o_u, mask=in_values, other=0.0) - tl.dot(b_w, state.to(b_w.dtype))
        tl.store(updates + o_u, b_u.to(updates.dtype.element_ty), mask=in_values)
        if USE_G:
            # g sums log2 decays from the chunk's start: the decay of each token's update, and of the state, at the chunk's end.
            g_last = tl.load(g + (tl.minimum(C, length - i_c * C) - 1) * HV)
            b_g = tl.load(g + o_c * HV, mask=in_chunk, other=0.0)
            b_u = b_u * tl.where(in_chunk, tl.exp2(g_last - b_g), 0.0)[:, None]
            state *= tl.exp2(g_last)
            g += C * HV
        b_k = tl.load(k + o_keys, mask=in_keys, other=0.0)
        state = tl.dot(tl.trans(b_k), b_u.to(b_k.dtype), state)

        slot = tl.load(snapshot_of_chunk + i_c).to(tl.int64)
        if slot >= 0:
            tl.store(snapshots + slot * HV * K * V + o_state, state, mask=in_state)
        states += HV * K * V
        k += C * H * K
        w += C * HV * K
        u += C * HV * V
        updates += C * HV * V


@triton.autotune(configs=CONFIGS, prune_configs_by={"early_config_prune": fitting}, **TUNING)
@triton.jit
def _gradient_kernel(
    q,
    k,
    w,
    g,
    grad_out,
    grad_local,
    grad_snapshots,
    grad_states,
    grad_updates,
    grad_initial,
    snapshot_of_chunk,
    cu_seqlens,
    chunk_offsets,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_G: tl.constexpr,
    USE_INITIAL: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    i_v = tl.program_id(0) % blocks
    i_n = (tl.program_id(0) // blocks // HV).to(tl.int64)
    i_h = tl.program_id(0) // blocks % HV
    begin = tl.load(cu_seqlens + i_n).to(tl.int64)
    length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - begin).to(tl.int32)
    first_chunk = tl.load(chunk_offsets + i_n).to(tl.int64)

    o_k, o_v, o_c = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    grad = tl.zeros([BK, BV], dtype=tl.float32)

    num_chunks = tl.cdiv(length, C)
    o_keys = o_c[:, None] * (H * K) + o_k[None, :]
    o_w = o_c[:, None] * (HV * K) + o_k[None, :]
    o_u = o_c[:, None] * (HV * V) + o_v[None, :]
    last_start = begin + (num_chunks - 1) * C
    last_chunk = first_chunk + num_chunks - 1
    grad_states += (last_chunk * HV + i_h) * K * V
    snapshot_of_chunk += last_chunk
    q += (last_start * H + i_h // (HV // H)) * K
    k += (last_start * H + i_h // (HV // H)) * K
    w += (last_start * HV + i_h) * K
    grad_out += (last_start * HV + i_h) * V
    grad_local += (last_start * HV + i_h) * V
    grad_updates += (last_start * HV + i_h) * V
    if USE_G:
        g += last_start * HV + i_h
    grad_snapshots += i_h * K * V

    for i in range(0, num_chunks):
        left = length - (num_chunks - 1 - i) * C
        in_chunk = o_c < left
        in_keys, in_values = in_chunk[:, None] & (o_k < K)[None, :], in_chunk[:, None] & (o_v < V)[None, :]
        slot = tl.load(snapshot_of_chunk - i).to(tl.int64)
        if slot >= 0:
            grad += tl.load(grad_snapshots + slot * HV * K * V + o_state, mask=in_state, other=0.0)
        tl.store(grad_states + o_state, grad.to(grad_states.dtype.element_ty), mask=in_state)

        b_k = tl.load(k + o_keys, mask=in_keys, other=0.0)
        b_du = tl.dot(b_k, grad.to(b_k.dtype))
        b_q = tl.load(q + o_keys, mask=in_keys, other=0.0)
        if USE_G:
            g_last = tl.load(g + (tl.minimum(C, left) - 1) * HV)
            b_g = tl.load(g + o_c * HV, mask=in_chunk, other=0.0)
            b_du *= tl.where(in_chunk, tl.exp2(g_last - b_g), 0.0)[:, None]
            grad *= tl.exp2(g_last)
            b_q = (b_q * tl.exp2(b_g)[:, None]).to(b_k.dtype)
            g -= C * HV
        b_du += tl.load(grad_local + o_u, mask=in_values, other=0.0)
        tl.store(grad_updates + o_u, b_du.to(grad_updates.dtype.element_ty), mask=in_values)

        b_w = tl.load(w + o_w, mask=in_keys, other=0.0)
        b_do = tl.load(grad_out + o_u, mask=in_values, other=0.0)
        grad += tl.dot(tl.trans(b_q), b_do.to(b_q.dtype)) * scale - tl.dot(tl.trans(b_w), b_du.to(b_w.dtype))
        grad_states -= HV * K * V
        q -= C * H * K
        k -= C * H * K
        w -= C * HV * K
        grad_out -= C * HV * V
        grad_local -= C * HV * V
        grad_updates -= C * HV * V
    if USE_INITIAL:
        tl.store(grad_initial + (i_n * HV + i_h) * K * V + o_state, grad, mask=in_state)


def scan_states(
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor | None,
    initial: torch.Tensor | None,
    snapshot_of_chunk: torch.Tensor,
    num_snapshots: int,
    cu_seqlens: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the state before each chunk of every sequence, the chunks' updates, and the snapshots.

    Args:
        k: keys, `[1, T, H, K]`.
        w, u: `[1, T, HV, K]` and `[1, T, HV, V]`: a chunk's updates are `u - w S` for the state S before it.
        g: float32 sums of log2 decays from each chunk's start, `[1, T, HV]`, or None.
        initial: float32 `[N, HV, K, V]`, or None for zeros.
        snapshot_of_chunk: int32 `[G]`, for each chunk the index of the snapshot that takes the state after it, or -1.
        cu_seqlens, chunk_offsets: `[N + 1]`, first token and first chunk of each sequence.

    Returns:
        States before each chunk `[1, G, HV, K, V]` in k's dtype, updates `[1, T, HV, V]`, and snapshots `[P, HV, K, V]` in float32.
    """
    (_, _, H, K), (HV, V), N = k.shape, u.shape[2:], len(cu_seqlens) - 1
    states = k.new_empty(1, len(snapshot_of_chunk), HV, K, V)
    updates = torch.empty_like(u)
    snapshots = k.new_empty(num_snapshots, HV, K, V, dtype=torch.float32)
    _scan_kernel[lambda meta: (triton.cdiv(V, meta["BV"]) * N * HV,)](
        k,
        w,
        u,
        g,
        initial,
        states,
        updates,
        snapshots,
        snapshot_of_chunk,
        cu_seqlens,
        chunk_offsets,
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=chunk_size,
        BK=_block(K),
        USE_G=g is not None,
        USE_INITIAL=initial is not None,
    )
    return states, updates, snapshots


def scan_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    g: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_local: torch.Tensor,
    grad_snapshots: torch.Tensor,
    has_initial: bool,
    snapshot_of_chunk: torch.Tensor,
    scale: float,
    cu_seqlens: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The backward of `scan_states`: goes through the chunks in reverse.

    Args:
        grad_out: gradient of the outputs, `[1, T, HV, V]`.
        grad_local: gradient of the updates through the outputs of their own chunk, the same shape.
        grad_snapshots: gradient of the snapshots, float32 `[P, HV, K, V]`.
        The other arguments are those of `scan_states`.

    Returns:
        Gradients of the state after each chunk `[1, G, HV, K, V]` in k's dtype, of the initial states or None, and of the updates.
    """
    (_, _, H, K), (HV, V), N = k.shape, grad_out.shape[2:], len(cu_seqlens) - 1
    grad_states = k.new_empty(1, len(snapshot_of_chunk), HV, K, V)
    grad_updates = torch.empty_like(grad_local)
    grad_initial = k.new_empty(N, HV, K, V, dtype=torch.float32) if has_initial else None
    _gradient_kernel[lambda meta: (triton.cdiv(V, meta["BV"]) * N * HV,)](
        q,
        k,
        w,
        g,
        grad_out,
        grad_local,
        grad_snapshots,
        grad_states,
        grad_updates,
        grad_initial,
        snapshot_of_chunk,
        cu_seqlens,
        chunk_offsets,
        scale,
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=chunk_size,
        BK=_block(K),
        USE_G=g is not None,
        USE_INITIAL=has_initial,
    )
    return grad_states, grad_initial, grad_updates


def _block(channels: int) -> int:
    """Block size along `channels`: `tl.dot` takes powers of two of at least 16."""
    return max(16, triton.next_power_of_2(channels))
