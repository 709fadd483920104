"""Hugging Face's `config.json` of a checkpoint: it tells the model, and so the tensors that the checkpoint must have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.limits import check_small_file, read_small_file
from refine_titan.models import FAMILIES, build_decoder, family_of_model_type
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter

CONFIG_FILE = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        UserError: if it holds something else, or cannot be read.
    """
    return parse_json(_read_bytes(path), path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Reads the JSON object in `raw`, the content of `path`.

    Raises:
        UserError: if `raw` holds something else.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers of thousands of digits, of nesting
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {str(value)[:40]!r}, expected a JSON object")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        check_small_file(path)
        refuse_lfs_pointer(path)
        return read_small_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class ModelConfig:
    """A `config.json` that was understood.

    Attributes:
        path: the file.
        raw: its bytes; keys of earlier versions of the model's library have the names of today.
        family_name: `model.name` of the family.
        args: sizes and options.
        tensors: the model's state dict under our names, on the meta device.
        source: what describes the model, in messages.
    """

    path: Path
    raw: bytes
    family_name: str
    args: DecoderArgs
    tensors: dict[str, torch.Tensor]
    source: str = CONFIG_FILE

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Reads the file, or the `config.json` of a folder.

        Raises:
            UserError: if it is missing, unreadable, of an unknown model, or asks for something the model does not have.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_FILE
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a model's configuration in Hugging Face's terms")
        raw = _read_bytes(path)
        config = parse_json(raw, path)
        try:
            family_name = family_of_model_type(config.get("model_type"))
            args_class = FAMILIES[family_name].args_class
            args = args_class.from_hf_config(config)
            todays = args_class.hf_format.with_todays_keys(config)
            tensors = empty_state_dict(args)
        # Absurd sizes pass the checks: products beyond 64 bits, about which torch may write several lines.
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            reason = str(error).removeprefix(f"{CONFIG_FILE}: ").partition("\n")[0]
            raise UserError(f"{path}: {reason}") from error
        if todays.keys() != config.keys():
            raw = json.dumps(todays, indent=2).encode()
        return cls(path, raw, family_name, args, tensors)

    def with_options(self, options: Sequence[str]) -> "ModelConfig":
        """The model in which `[model] options` override sizes and options.

        Raises:
            UserError: if there is no such option, or its value is not allowed.
        """
        if not options:
            return self
        args = self.args.with_options(options)
        return replace(self, args=args, tensors=empty_state_dict(args), source=f"{CONFIG_FILE} with model.options")

    @property
    def adapter(self) -> DecoderStateDictAdapter:
        """Renames the model's tensors."""
        return DecoderStateDictAdapter(self.args)


def empty_state_dict(args: DecoderArgs) -> dict[str, torch.Tensor]:
    """A model's state dict on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return build_decoder(args).state_dict()
