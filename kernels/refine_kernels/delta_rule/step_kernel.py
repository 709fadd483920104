"""The delta rule's decoding step in Triton: one pass over the states, in place. README.md has the maths.

Legend: N sequences, R next tokens of each, HK key heads, H value heads, K key and V value channels of a head.
"""

import torch
import triton
import triton.language as tl

# Elements of a state that one warp holds in registers. The columns of a state do not depend on each other, and narrow blocks of
# columns occupy more multiprocessors: 8 sequences with 16 heads of 128 channels make 1,024 programs.
BLOCK_ELEMENTS, NUM_WARPS = 2048, 1


def block_sizes(K: int, V: int) -> tuple[int, int]:
    """Key and value channels of a program's block."""
    BK = triton.next_power_of_2(K)
    return BK, max(1, min(BLOCK_ELEMENTS // BK, triton.next_power_of_2(V)))


@triton.jit
def _step_kernel(
    state,
    q,
    k,
    v,
    beta,
    g,
    out,
    scale,
    R,
    HK: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
    HEAD_DECAY: tl.constexpr,
    CHANNEL_DECAY: tl.constexpr,
):
    sequence_head = tl.program_id(0).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    o_k, o_v = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    p_state = state + sequence_head * K * V + o_k[:, None] * V + o_v[None, :]
    in_state = in_k[:, None] & in_v[None, :]
    b_state = tl.load(p_state, mask=in_state, other=0.0).to(ACC)
    for r in range(R):
        token = n * R + r
        key, value = token * HK + h // (H // HK), token * H + h
        b_k = tl.load(k + key * K + o_k, mask=in_k, other=0.0).to(ACC)
        b_q = tl.load(q + key * K + o_k, mask=in_k, other=0.0).to(ACC) * scale
        if HEAD_DECAY:
            b_state *= tl.exp(tl.load(g + value).to(ACC))
        if CHANNEL_DECAY:
            b_state *= tl.exp(tl.load(g + value * K + o_k, mask=in_k, other=0.0).to(ACC))[:, None]
        error = tl.load(v + value * V + o_v, mask=in_v, other=0.0).to(ACC) - tl.sum(b_state * b_k[:, None], 0)
        b_state += b_k[:, None] * (tl.load(beta + value).to(ACC) * error)[None, :]
        tl.store(out + value * V + o_v, tl.sum(b_state * b_q[:, None], 0).to(out.dtype.element_ty), mask=in_v)
    tl.store(p_state, b_state.to(state.dtype.element_ty), mask=in_state)


def run_step(state_NHKV, q_NRHK, k_NRHK, v_NRHV, beta_NRH, log_decay) -> torch.Tensor:
    """Same contract as `refine_kernels.delta_rule.step.delta_rule_step_`."""
    if not state_NHKV.is_contiguous():
        raise ValueError(f"the states must be contiguous, got strides {state_NHKV.stride()} for {tuple(state_NHKV.shape)}")
    q, k, v, beta = (x.contiguous() for x in (q_NRHK, k_NRHK, v_NRHV, beta_NRH))
    (N, R, H, V), (HK, K) = v.shape, k.shape[2:]
    out = torch.empty_like(v)
    BK, BV = block_sizes(K, V)
    _step_kernel[(N * H, triton.cdiv(V, BV))](
        state_NHKV,
        q,
        k,
        v,
        beta,
        None if log_decay is None else log_decay.contiguous(),
        out,
        K**-0.5,
        R,
        HK=HK,
        H=H,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        ACC=tl.float64 if state_NHKV.dtype == torch.float64 else tl.float32,
        HEAD_DECAY=log_decay is not None and log_decay.dim() == 3,
        CHANNEL_DECAY=log_decay is not None and log_decay.dim() == 4,
        num_warps=NUM_WARPS,
    )
    return out
