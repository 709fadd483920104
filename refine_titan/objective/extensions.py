"""Rewards and selections of installed packages, which name them in their metadata: the entry-point groups `refine_titan.rewards`
and `refine_titan.selections`. `docs/rewards.md` says how to write one.

What their functions return is checked at every call.
"""

import operator
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from refine_titan.config.extensions import Extension, find_extension
from refine_titan.errors import ExtensionError
from refine_titan.objective.positions import SELECTIONS, Candidates, SelectionRule
from refine_titan.objective.rewards import REWARDS, Reward, RewardInputs

REWARD_GROUP, SELECTION_GROUP = "refine_titan.rewards", "refine_titan.selections"


def find_reward(name: str) -> Reward:
    """The reward that `refine.reward` names: a built-in one, or one of an installed package.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported. The returned function raises it for a wrong result.
    """
    extension = find_extension("refine.reward", name, REWARDS, REWARD_GROUP)
    return REWARDS[name] if extension is None else InstalledReward(extension)


def find_selection(name: str) -> SelectionRule:
    """The selection that `refine.selection` names: a built-in one, or one of an installed package.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported. The returned function raises it for a wrong result.
    """
    extension = find_extension("refine.selection", name, SELECTIONS, SELECTION_GROUP)
    return SELECTIONS[name] if extension is None else InstalledSelection(extension)


@dataclass(frozen=True)
class InstalledReward:
    """A reward of an installed package whose results are checked: `[n]`, float32, on the inputs' device, finite."""

    extension: Extension

    def __call__(self, inputs: RewardInputs) -> torch.Tensor:
        label, tokens_nk = self.extension.label, inputs.tokens_nk
        tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
        versions = {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}
        reward_n = self.extension(inputs)
        for name, version in versions.items():
            if tensors[name]._version != version:
                raise ExtensionError(f"{label} has changed {name} in place; it must leave what it is given as it is")
        wanted = f"wanted is a tensor [{len(tokens_nk)}], torch.float32, on {tokens_nk.device}: one number a rollout"
        if not isinstance(reward_n, torch.Tensor):
            raise ExtensionError(f"{label} returned an object of type {type(reward_n).__name__}; {wanted}")
        if reward_n.shape != tokens_nk.shape[:1] or reward_n.dtype != torch.float32 or reward_n.device != tokens_nk.device:
            raise ExtensionError(f"{label} returned a tensor {list(reward_n.shape)}, {reward_n.dtype}, on {reward_n.device}; {wanted}")
        wrong = (~reward_n.isfinite()).nonzero()[:, 0].tolist()
        if wrong:
            i = wrong[0]
            more = f"; {len(wrong)} of {len(tokens_nk)} rewards are not finite" if len(wrong) > 1 else ""
            raise ExtensionError(
                f"{label} returned {float(reward_n[i])} for rollout {i}, tokens {tokens_nk[i].tolist()}, true tokens "
                f"{inputs.true_tokens_nk[i].tolist()}; wanted is a finite number{more}"
            )
        return reward_n


@dataclass(frozen=True)
class InstalledSelection:
    """A selection of an installed package whose results are checked: the index of an allowed token."""

    extension: Extension

    def __call__(self, candidates: Candidates) -> int:
        label, chosen = self.extension.label, self.extension(candidates)
        try:
            token = operator.index(chosen)
        except TypeError:
            raise ExtensionError(f"{label} returned {chosen!r}; wanted is the index of a token, a whole number") from None
        num_tokens = len(candidates.allowed_C)
        if not 0 <= token < num_tokens:
            raise ExtensionError(f"{label} returned {token}; wanted is the index of one of the chunk's tokens, 0 to {num_tokens - 1}")
        if not candidates.allowed_C[token]:
            raise ExtensionError(f"{label} returned {token}, a token at which allowed_C is false: its document is too short for a rollout")
        return token


def packages_of(reward: str, selection: str) -> list[str]:
    """Names of the installed packages that give a reward and a selection; none for built-in names."""
    found = [*entry_points(group=REWARD_GROUP, name=reward), *entry_points(group=SELECTION_GROUP, name=selection)]
    return sorted({entry.dist.name for entry in found})
