"""Which model of a family a run trains: a preset, or what a `config.json` says, with the options that the run overrides."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from refine_titan.config.titan_sections import Model
from refine_titan.config.type_checks import did_you_mean
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.model_config import ModelConfig


def is_path(name: str, flavor: str) -> bool:
    """Whether `model.flavor` is a path, not a preset of the family `name`."""
    return flavor not in FAMILIES[name].flavors and ("/" in flavor or flavor.endswith(".json") or Path(flavor).exists())


def resolve_flavor(name: str, flavor: str) -> DecoderArgs:
    """Sizes and options of `model.flavor` of the family `name`.

    Raises:
        UserError: if it is neither a preset nor a `config.json` of this family.
    """
    presets = FAMILIES[name].flavors
    if flavor in presets:
        return presets[flavor]
    if not is_path(name, flavor):
        raise UserError(
            f"model.flavor is {flavor!r}; {name} has: {', '.join(presets)}, or the path of a config.json{did_you_mean(flavor, presets)}"
        )
    try:
        config = ModelConfig.read(flavor)
    except UserError as error:
        raise UserError(f"model.flavor: {error}") from error
    if config.family_name != name:
        raise UserError(f"model.flavor: {config.path} is of the family {config.family_name!r}, but model.name is {name!r}")
    return config.args


def resolve_args(model: Model) -> DecoderArgs:
    """Sizes and options of a run's model: those of its flavor, in which `[model] options` override some. The caller's own copy.

    Raises:
        UserError: if there is no such flavor or option, or a value is not allowed.
    """
    return resolve_flavor(model.name, model.flavor).with_options(model.options)


class Flavors(Mapping[str, DecoderArgs]):
    """A family's presets by name, for torchtitan; any other key is the path of a `config.json`."""

    def __init__(self, name: str):
        self._name = name

    def __getitem__(self, flavor: str) -> DecoderArgs:
        # A copy: torchtitan's trainer lets the job change the args that it takes.
        return replace(resolve_flavor(self._name, flavor))

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES[self._name].flavors)

    def __len__(self) -> int:
        return len(FAMILIES[self._name].flavors)


def differences(found: DecoderArgs, expected: DecoderArgs) -> list[str]:
    """Lists what differs between two models of a family, as `setting found (flavor: expected)`."""
    found_values, expected_values = _comparable(found), _comparable(expected)
    return [f"{key} {value!r} (flavor: {expected_values[key]!r})" for key, value in found_values.items() if value != expected_values[key]]


def _comparable(args: DecoderArgs) -> dict:
    """What a `config.json` says of a model, with the MLP's width in one of its two ways, and without what only random weights depend
    on."""
    values = {name: getattr(args, name) for name in args.hf_format.all_keys}
    return values | {"intermediate_size": args.mlp_dim, "hidden_ratio": None, "initializer_range": None}
