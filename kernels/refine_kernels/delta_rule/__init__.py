"""The delta rule, gated or not, over packed sequences, with the state at any position as an output. Maths in README.md."""

from collections.abc import Sequence

import torch

from refine_kernels.delta_rule.footprint import delta_rule_footprint
from refine_kernels.delta_rule.reference import chunked_delta_rule
from refine_kernels.delta_rule.step import delta_rule_step_
from refine_kernels.footprint import wants_gpu_footprint

__all__ = ["delta_rule", "delta_rule_step_"]


def delta_rule(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THV: torch.Tensor,
    beta_TH: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    log_decay: torch.Tensor | None = None,
    initial_state_NHKV: torch.Tensor | None = None,
    state_positions: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """`S'_t = a_t S_{t-1}`, `S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T`, `o_t = S_t^T q_t / sqrt(K)`, per head and
    packed sequence, with `a_t = exp(log_decay_t)`, or 1.

    Runs flash-linear-attention's kernels on a GPU and plain torch elsewhere. Differentiable in every tensor argument,
    through the outputs and through the states.

    Args:
        q_THK, k_THK: T rows of N packed sequences; already normalised. Their heads divide those of v: each serves a
            group of neighbouring value heads.
        v_THV, beta_TH: the same rows, H heads.
        cu_seqlens: N + 1 row indices at which the sequences begin and end, as host integers.
        log_decay: at most 0; `[T, H]` for one decay per head (GatedDeltaNet), `[T, H, K]` for one per key channel (KDA),
            None for none (DeltaNet).
        initial_state_NHKV: float32 state that each sequence starts from; zeros if None.
        state_positions: P row indices r in 1..T; the state after row r - 1 of the sequence that holds row r - 1.

    Returns:
        Outputs `[T, H, V]` in v's dtype and states `[P, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if `cu_seqlens` does not cover the rows, a state position lies outside, or the heads do not divide.
    """
    if v_THV.shape[1] % k_THK.shape[1] or q_THK.shape != k_THK.shape:
        raise ValueError(f"q and k must have equal heads that divide v's, got {[x.shape[1] for x in (q_THK, k_THK, v_THV)]}")
    if q_THK.is_cuda:
        from refine_kernels.delta_rule.flash_linear_attention import segmented_delta_rule as implementation
    elif wants_gpu_footprint():
        implementation = delta_rule_footprint
    else:
        implementation = chunked_delta_rule
    return implementation(
        q_THK,
        k_THK,
        v_THV,
        beta_TH,
        cu_seqlens,
        log_decay=log_decay,
        initial_state_NHKV=initial_state_NHKV,
        state_positions=state_positions,
    )
