"""Which size of a family a run trains: a preset, or what a `config.json` says."""

from dataclasses import replace
from pathlib import Path

from refine_titan.config.type_checks import suggest
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.hf_format import DECODER_KEYS
from refine_titan.models.model_config import ModelConfig


def is_path(name: str, flavor: str) -> bool:
    """Whether `model.flavor` is a path rather than a preset of the family `name`."""
    return flavor not in FAMILIES[name].flavors and ("/" in flavor or flavor.endswith(".json") or Path(flavor).exists())


def resolve_flavor(name: str, flavor: str) -> DecoderArgs:
    """Sizes of `model.flavor` of the family `name`.

    Raises:
        UserError: if it is neither a preset nor a `config.json` of this family.
    """
    presets = FAMILIES[name].flavors
    if flavor in presets:
        return presets[flavor]
    if not is_path(name, flavor):
        raise UserError(
            f"model.flavor is {flavor!r}; {name} has: {', '.join(presets)}, or the path of a config.json{suggest(flavor, list(presets))}"
        )
    try:
        config = ModelConfig.read(flavor)
    except UserError as error:
        raise UserError(f"model.flavor: {error}") from error
    if config.family_name != name:
        raise UserError(f"model.flavor: {config.path} is of the family {config.family_name!r}, but model.name is {name!r}")
    return config.args


class Flavors(dict):
    """A family's presets by name, for torchtitan; any other key is the path of a `config.json`."""

    def __init__(self, name: str):
        # Copies: torchtitan lets a job change the args that it trains with.
        super().__init__({flavor: replace(args) for flavor, args in FAMILIES[name].flavors.items()})
        self._name = name

    def __missing__(self, flavor: str) -> DecoderArgs:
        return resolve_flavor(self._name, flavor)


def differences(found: DecoderArgs, expected: DecoderArgs) -> list[str]:
    """What makes two models of a family different: `setting found (flavor: expected)`, one entry each."""
    found_values, expected_values = _comparable(found), _comparable(expected)
    return [f"{key} {value!r} (flavor: {expected_values[key]!r})" for key, value in found_values.items() if value != expected_values[key]]


def _comparable(args: DecoderArgs) -> dict:
    """What a `config.json` says of a model: the MLP's width said in one of two ways, and without what only random weights
    depend on."""
    values = {name: getattr(args, name) for name in DECODER_KEYS | args.hf_format.keys}
    return values | {"intermediate_size": args.mlp_dim, "hidden_ratio": None, "initializer_range": None}
