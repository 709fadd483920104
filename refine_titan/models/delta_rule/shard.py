"""The delta rule over a trunk that several ranks share.

Legend: T tokens of the shard, H value heads, K key and V value channels of a head, P positions.
"""

from collections.abc import Callable

import torch

from refine_kernels.packing import on_device
from refine_titan.models.context_shard import ContextShard, compose_states, tied


def delta_rule_of_shard(
    delta_rule: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    rows: tuple[torch.Tensor | None, ...],
    cu_seqlens: tuple[int, ...],
    shard: ContextShard,
    state_positions: tuple[int, ...],
    state_shape: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the delta rule over the shard's tokens, with the state that arrives from earlier ranks.

    Tokens act on a state by a linear map, so a rank need not wait for the ranks before it. A document that has begun there runs with
    values `[v | 0]` from the state `[0 | 1]`: that gives every output and state as a sum of its own part and a factor times the state on
    arrival. The state on arrival follows once the last parts and factors of all ranks are known.

    Args:
        delta_rule: takes rows, cu_seqlens, initial states and state positions.
        rows: q, k, v, beta, and log decay or None, each `[T, heads, ...]`.
        state_positions: position 0 is the state of the first sequence on arrival.
        state_shape: H, K and V.

    Returns:
        Outputs `[T, H, V]`, and the states at the positions, `[P, H, K, V]`.
    """
    T, (_, K, V) = cu_seqlens[-1], state_shape
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    first_end = cu_seqlens[1] if shard.seen else 0
    positions = sorted({r for r in state_positions if r > 0} | {T})
    in_first = [r for r in positions if r <= first_end]
    outputs, states = [], []
    factors = rows[0].new_zeros(len(positions), *state_shape[:2], K, dtype=wide)
    if first_end:
        q, k, v, *gates = (None if x is None else x[:first_end] for x in rows)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], K)], -1)
        start = torch.cat([factors.new_zeros(state_shape), torch.eye(K, dtype=wide, device=v.device).expand_as(factors[0])], -1)
        out, found = delta_rule(q, k, v, *gates, (0, first_end), start[None], tuple(in_first))
        first_out, read_THK = out.split([V, K], -1)
        first_states, first_factors = found.split([V, K], -1)
        states.append(first_states)
        factors = torch.cat([first_factors, factors[len(in_first) :]])
    if first_end < T:
        rest = (None if x is None else x[first_end:] for x in rows)
        rest_cu_seqlens = tuple(r - first_end for r in cu_seqlens if r >= first_end)
        out, found = delta_rule(*rest, rest_cu_seqlens, None, tuple(r - first_end for r in positions[len(in_first) :]))
        outputs.append(out)
        states.append(found)
    states = torch.cat(states)
    arrived = compose_states(factors[-1], states[-1], shard)
    if first_end:
        with torch.autocast(arrived.device.type, enabled=False):
            first_out = first_out.to(wide) + (read_THK.to(wide).transpose(0, 1) @ arrived).transpose(0, 1)
            states = states + factors @ arrived
        outputs.insert(0, first_out.to(rows[2].dtype))
    order = [0 if r == 0 else 1 + positions.index(r) for r in state_positions]
    order_P = on_device(torch.tensor(order, dtype=torch.long), states.device)
    states = torch.cat([arrived[None], states]).index_select(0, order_P)
    return tied(torch.cat(outputs), arrived), states
