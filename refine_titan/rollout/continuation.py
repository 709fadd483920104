"""Continues prefixes from snapshots with the trainer's own model, with or without gradient.

Legend: n rollouts, k tokens, D hidden channels, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from refine_kernels.packing import on_device
from refine_titan.models.decoder import DecoderOutput
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout, SnapshotBank
from refine_titan.rollout.engine import PrefixStates

Model = Callable[..., DecoderOutput]


def replay_prefixes(model: Model, bank: SnapshotBank, tokens_T: torch.Tensor, starts: Sequence[int]) -> PrefixStates:
    """Returns the states of the prefixes that end at `starts`, each without its last token.

    One packed forward replays all prefixes, each from its last snapshot: fewer than `bank.stride` tokens. If every token has a
    snapshot, there is no forward.
    """
    unique = sorted(set(starts))
    boundaries = [bank.boundary_before(r) for r in unique]
    tails = [(boundary, r - 1) for r, (boundary, _) in zip(unique, boundaries)]
    states = [layer.select_or_empty([index for _, index in boundaries]) for layer in bank.layers]
    if bank.stride == 1:
        return _at(starts, unique, tokens_T, states)

    moving = [i for i, (begin, end) in enumerate(tails) if end > begin]
    # If nothing is to be replayed, the last token of a prefix is, without use: all ranks must make equally many forwards.
    replayed_tails = [tails[i] for i in moving] or [(tails[0][1], tails[0][1] + 1)]
    ends = tuple(accumulate(end - begin for begin, end in replayed_tails))
    replayed = model(
        torch.cat([tokens_T[begin:end] for begin, end in replayed_tails]),
        SharedPrefixLayout(cu_seqlens=(0, *ends), state_positions=ends),
        initial_states=[layer.select(torch.tensor(moving or [0])) for layer in states],
    ).states
    if not moving:
        states = [layer.tied_to(for_nothing) for layer, for_nothing in zip(states, replayed)]
    elif len(moving) == len(tails):
        states = replayed
    else:
        # A prefix that ends at its snapshot needs no replay: the snapshot takes the place of a replayed state.
        source = [len(moving) + i for i in range(len(tails))]
        for place, i in enumerate(moving):
            source[i] = place
        states = [LayerState.cat([r, s]).select(torch.tensor(source)) for r, s in zip(replayed, states)]

    return _at(starts, unique, tokens_T, states)


def _at(starts: Sequence[int], unique: list[int], tokens_T: torch.Tensor, states: list[LayerState]) -> PrefixStates:
    """Selects from the states at `unique` those at `starts`, with the tokens before them."""
    if list(starts) != unique:
        order = torch.tensor([unique.index(r) for r in starts])
        states = [layer.select(order) for layer in states]
    last = on_device(torch.tensor(starts) - 1, tokens_T.device)
    return PrefixStates(tokens_T.index_select(0, last), states)


@dataclass(frozen=True)
class RescoredRollouts:
    """Logits and hidden states of rollouts by the trainer's own model.

    Attributes:
        logits_nkV: logits of the distribution from which each token was drawn.
        hidden_nkD: hidden state after the final norm, at each token.
    """

    logits_nkV: torch.Tensor
    hidden_nkD: torch.Tensor


def rescore_rollouts(model: Model, prefix: PrefixStates, tokens_nk: torch.Tensor) -> RescoredRollouts:
    """Runs the model over the last token of each prefix and its rollout, all rollouts in one packed forward."""
    n, k = tokens_nk.shape
    stream = torch.cat([prefix.last_tokens_n[:, None], tokens_nk], dim=1)
    rows = torch.arange(n * (k + 1)).view(n, k + 1)
    out = model(
        stream.flatten(),
        SharedPrefixLayout(cu_seqlens=tuple(range(0, n * (k + 1) + 1, k + 1))),
        initial_states=prefix.layers,
        logit_rows=rows[:, :-1],
    )
    return RescoredRollouts(out.logits, out.hidden_TD.view(n, k + 1, -1)[:, 1:])
