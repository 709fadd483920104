"""The definition of LaCT's fast weights: one sequence at a time, every update by automatic differentiation of its objective.

Legend: T tokens, H heads, D channels of a head, M hidden channels of the fast network, L learning rates of a weight (1 or D).
"""

import torch
import torch.nn.functional as F

from refine_kernels.lact.newton_schulz import orthogonalise


def fast_network(weights, x_HTD: torch.Tensor) -> torch.Tensor:
    """`f(x) = w1 (silu(w0 x) * (w2 x))` per head."""
    w0, w1, w2 = weights
    return (F.silu(x_HTD @ w0.mT) * (x_HTD @ w2.mT)) @ w1.mT


def lact_by_definition(
    q_THD,
    k_THD,
    v_THD,
    lr_TH3L,
    momentum_TH,
    initial,
    cu_seqlens,
    *,
    chunk_size,
    muon=False,
    muon_joins=False,
    prenorm=False,
    newton_schulz_dtype=torch.float32,
):
    """Outputs `[T, H, D]` of `refine_kernels.lact.lact` for sequences without past."""
    outputs = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        weights = main = list(initial)
        norms = [w.norm(dim=-1, keepdim=True) for w in initial]
        previous = [torch.zeros_like(w) for w in initial]
        for chunk in range(start, end, chunk_size):
            tokens = slice(chunk, min(chunk + chunk_size, end))
            q, k, v = (x[tokens].transpose(0, 1) for x in (q_THD, k_THD, v_THD))
            outputs.append(fast_network(weights, q).transpose(0, 1))
            if tokens.stop == end:
                break
            gradients = _ascent_directions(weights, k, v, lr_TH3L[tokens].permute(2, 1, 0, 3))
            if momentum_TH is not None:
                kept = momentum_TH[tokens].mean(0)[:, None, None]
                gradients = [g + kept * old for g, old in zip(gradients, previous)]
                previous = gradients
            if muon and muon_joins:
                joined = orthogonalise(torch.cat((gradients[0], gradients[2]), 1), newton_schulz_dtype)
                w1 = orthogonalise(gradients[1], newton_schulz_dtype)
                gradients = [joined[:, : joined.shape[1] // 2], w1, joined[:, joined.shape[1] // 2 :]]
            elif muon:
                gradients = [orthogonalise(g, newton_schulz_dtype) for g in gradients]
            main = [w + g for w, g in zip(main, gradients)]
            weights = [w / (w.norm(dim=-1, keepdim=True) + 1e-5) * norm for w, norm in zip(main, norms)]
            if not prenorm:
                main = weights
    return torch.cat(outputs)


def _ascent_directions(weights, k_HTD, v_HTD, lr_3HTL):
    """Gradient of `sum_t <f(k_t), v_t>` for each weight, where each token's part is multiplied by its learning rate for that weight.

    The learning rate scales one factor of the token's outer product: the key for w0 and w2, the hidden activation for w1.
    """
    w0, w1, w2 = weights
    gate, up = k_HTD @ w0.mT, k_HTD @ w2.mT

    def hidden(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * y

    _, (d_gate, d_up) = torch.autograd.functional.vjp(hidden, (gate, up), v_HTD @ w1, create_graph=True)
    return [
        d_gate.mT @ (k_HTD * lr_3HTL[0]),
        v_HTD.mT @ (hidden(gate, up) * lr_3HTL[1]),
        d_up.mT @ (k_HTD * lr_3HTL[2]),
    ]
