"""Rewards and selections of installed packages, which name them in their metadata: the entry-point groups `refine_titan.rewards`
and `refine_titan.selections`. `docs/rewards.md` says how to write one.

Only the package of a name that is asked for is imported. What its function returns is checked at every call.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from traceback import extract_tb
from typing import Any

import torch

from refine_titan.config.type_checks import did_you_mean
from refine_titan.errors import ExtensionError, UserError
from refine_titan.objective.positions import SELECTIONS, Candidates, SelectionRule
from refine_titan.objective.rewards import REWARDS, Reward, RewardInputs

REWARD_GROUP, SELECTION_GROUP = "refine_titan.rewards", "refine_titan.selections"


def find_reward(name: str) -> Reward:
    """The reward that `refine.reward` names: a built-in one, or one of an installed package.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported. The returned function raises it for a wrong result.
    """
    extension = _find_extension("refine.reward", name, REWARDS, REWARD_GROUP)
    return REWARDS[name] if extension is None else InstalledReward(extension)


def find_selection(name: str) -> SelectionRule:
    """The selection that `refine.selection` names: a built-in one, or one of an installed package.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported. The returned function raises it for a wrong result.
    """
    extension = _find_extension("refine.selection", name, SELECTIONS, SELECTION_GROUP)
    return SELECTIONS[name] if extension is None else InstalledSelection(extension)


@dataclass(frozen=True)
class Extension:
    """A function of an installed package.

    Attributes:
        label: the setting, the name, and the package with its version, for errors.
        function: takes one argument.
    """

    label: str
    function: Callable[[Any], Any]

    def __call__(self, inputs: Any) -> Any:
        try:
            return self.function(inputs)
        except Exception as error:  # the package's code may raise anything
            error = _begun_in_package(error)
            raise ExtensionError(f"{self.label} failed{_place(error)} with {_in_one_line(error)}") from error


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


def _find_extension(setting: str, name: str, built_in: Mapping[str, Any], group: str) -> Extension | None:
    """The installed function of that name, imported; None for a built-in name."""
    installed = entry_points(group=group)
    found = [entry for entry in installed if entry.name == name]
    if len(found) + (name in built_in) > 1:
        givers = ["refine_titan itself"] * (name in built_in) + [f"package {_package(entry)}" for entry in found]
        raise UserError(f"{setting} is {name!r}, a name that is given by {' and by '.join(givers)}; uninstall or rename all but one")
    if name in built_in:
        return None
    if not found:
        known = [*built_in, *(entry.name for entry in installed)]
        packages = ", ".join(f"{entry.name!r} (package {_package(entry)})" for entry in installed)
        raise UserError(
            f"{setting} is {name!r}; allowed: {', '.join(map(repr, built_in))} (built in), and what installed packages give "
            f"as {group}: {packages or 'nothing'}{did_you_mean(name, known)}"
        )
    label = f"{setting} = {name!r} of package {_package(found[0])}"
    try:
        function = found[0].load()
    except Exception as error:  # importing the package runs its code, which may raise anything
        message = f"{label} cannot be imported from {found[0].value!r}: {_in_one_line(error)}"
        raise ExtensionError(message) from _begun_in_package(error)
    if not callable(function):
        raise ExtensionError(f"{label} is an object of type {type(function).__name__} ({found[0].value!r}); wanted is a function")
    return Extension(label, function)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}"


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _place(error: Exception) -> str:
    """The last line of the function's own file that was reached, for ranks whose traceback is not shown; empty if none was."""
    frames = extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f" in line {lines[-1]} of {frames[0].filename}" if lines else ""


def _begun_in_package(error: Exception) -> Exception:
    """The error with a traceback that leaves out how this file, through Python's import system, came to the package's code."""
    traceback = error.__traceback__
    ours = (__name__, "importlib", "_frozen_importlib")
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith(ours):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)
