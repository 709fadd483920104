"""The delta rule, gated or not, over packed sequences. It returns outputs and the state at any position.

Open README.md for the maths, then reference.py, which defines the result.
"""

from collections.abc import Sequence

import torch

from refine_kernels.delta_rule.footprint import delta_rule_footprint
from refine_kernels.delta_rule.reference import chunked_delta_rule
from refine_kernels.delta_rule.step import delta_rule_step_
from refine_kernels.footprint import wants_gpu_footprint

__all__ = ["LARGEST_GPU_KEY", "delta_rule", "delta_rule_step_"]

# Key channels of a head in flash-linear-attention 0.6.0's kernels, at most.
LARGEST_GPU_KEY = 256


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
    """Computes `S'_t = a_t S_{t-1}`, `S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T`, `o_t = S_t^T q_t / sqrt(K)` for each head of
    each packed sequence, with `a_t = exp(log_decay_t)`, or 1.

    A GPU runs our Triton kernels and flash-linear-attention's; other devices run plain torch. Differentiable in every tensor
    argument, through the outputs and through the states.

    Args:
        q_THK, k_THK: queries and keys of T tokens in N packed sequences, already normalised. The number of their heads divides
            H: each serves a group of neighbouring value heads.
        v_THV, beta_TH: values and write strengths of the same tokens, H heads.
        cu_seqlens: N + 1 token indices at which the sequences begin and end, as host integers.
        log_decay: at most 0; `[T, H]` for one decay per head (GatedDeltaNet), `[T, H, K]` for one per key channel (KDA),
            None for none (DeltaNet).
        initial_state_NHKV: float32 state that each sequence starts from; zeros if None.
        state_positions: P positions r in 1..T; the state at r is that of token r - 1's sequence after token r - 1.

    Returns:
        Outputs `[T, H, V]` in v's dtype and states `[P, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: `cu_seqlens` does not cover the tokens, a state position lies outside, or the heads do not divide.
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
