"""The weights from which a run starts (`checkpoint.initial_load_path`, `initial_load_in_hf`), and the description of its model."""

import json
from pathlib import Path

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import in_toml
from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files, holds_byte_tokenizer
from refine_titan.conversion.carried import CarriedTensors
from refine_titan.conversion.dcp_checksums import METADATA_FILE
from refine_titan.conversion.dcp_entries import check_entries
from refine_titan.conversion.dcp_weights import DCPWeights
from refine_titan.conversion.description import ModelDescription, find_assets, has_tokenizer, json_bytes
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig, empty_state_dict
from refine_titan.models.options import read_options
from refine_titan.models.sizes import differences, is_path
from refine_titan.models.stored_tensors import first_of

# Settings of [checkpoint] that say what a run loads first, and their values that say nothing.
START_SETTINGS = {"initial_load_path": None, "initial_load_in_hf": False, "load_step": -1}


def start_folder(config: JobConfig) -> Path | None:
    """The checkpoint from which a run starts that has no checkpoints of its own; None for random weights."""
    path = config.checkpoint.initial_load_path
    if config.checkpoint.initial_load_in_hf:
        path = path or config.model.hf_assets_path
    return Path(path) if path else None


def validate_start(config: JobConfig, args: DecoderArgs) -> None:
    """Checks that the starting weights are weights of the run's model.

    Raises:
        UserError: something is missing or differs; the message names it.
    """
    folder, path = start_folder(config), config.checkpoint.initial_load_path
    if folder is not None and not config.model.hf_assets_path and has_tokenizer(folder) and not holds_byte_tokenizer(folder):
        logger.warning(
            f"model.hf_assets_path is '': the run reads bytes, although the weights in {folder} come with a tokenizer; with "
            f"model.hf_assets_path = '{folder}' it uses that"
        )
    if path is not None and not Path(path).is_dir():
        raise UserError(f"checkpoint.initial_load_path is {path!r}; allowed: an existing folder, or a model of the Hub (owner/name)")
    if config.checkpoint.initial_load_in_hf:
        if folder is None or not (folder / CONFIG_FILE).is_file():
            where = f"{folder} holds no {CONFIG_FILE}" if folder else "no folder is given"
            raise UserError(f"checkpoint.initial_load_in_hf: {where}; allowed: a Hugging Face folder as checkpoint.initial_load_path")
        start = _read_start(config, args, folder, "checkpoint.initial_load_in_hf")
        try:
            weights = HFWeights(folder)
            weights.check(start)
        except UserError as error:
            raise UserError(f"checkpoint.initial_load_in_hf: {error}") from error
        if weights.is_early:
            raise UserError(
                f"checkpoint.initial_load_in_hf: {folder} has gate and up projections in one tensor, as flash-linear-attention wrote them "
                "until early 2025; allowed: what `refine-titan convert from-hf` makes of it, with "
                "checkpoint.initial_load_in_hf = false"
            )
        for note in weights.notes(start):
            logger.info(f"{folder}: {note}")
    elif folder is not None:
        if not (folder / METADATA_FILE).is_file():
            raise UserError(
                f"checkpoint.initial_load_path: {folder} is not a complete DCP checkpoint ({METADATA_FILE} is missing); "
                "a run's are its checkpoint/step-N, and a Hugging Face folder needs checkpoint.initial_load_in_hf = true"
            )
        weights = DCPWeights(folder)  # torchtitan would unpickle any metadata; this refuses all that is not plain data
        if (folder / CONFIG_FILE).is_file():
            _read_start(config, args, folder, "checkpoint.initial_load_path")
        source = "model.flavor with model.options" if config.model.options else "model.flavor"
        problems = weights.mismatches_with(args, empty_state_dict(args), source)
        if problems:
            raise UserError(f"checkpoint.initial_load_path: {folder}: {first_of(problems)}")
        if not config.checkpoint.initial_load_model_only:
            check_entries(weights.reader)


def refuse_unloaded_start(config: JobConfig) -> None:
    """Refuses a training whose settings name weights that it would not load. An evaluation loads them whatever these settings say.

    Raises:
        UserError: naming the setting that says what to load, and the one that keeps it from being loaded.
    """
    checkpoint = config.checkpoint
    named = next((name for name, unset in START_SETTINGS.items() if getattr(checkpoint, name) not in (unset, "")), None)
    if named is None:
        return
    problem = f"checkpoint.{named} is {in_toml(getattr(checkpoint, named))}, but "
    if not checkpoint.enable:
        raise UserError(
            f"{problem}checkpoint.enable is false, with which a training loads nothing; allowed: checkpoint.enable = true, with "
            "checkpoint.load_only = true to write no checkpoints"
        )
    if checkpoint.create_seed_checkpoint:
        raise UserError(f"{problem}checkpoint.create_seed_checkpoint is true, which writes random weights; allowed: one of the two")


def describe_run(config: JobConfig, args: DecoderArgs, tokenizer: BaseTokenizer, own_checkpoint: Path | None = None) -> ModelDescription:
    """The `config.json` and the tokenizer's files that the run writes into its checkpoints.

    The `config.json` is the one that gave the model its sizes, or the one of the starting weights, unchanged but for `model.options`; if
    there is neither, it is made from the model's sizes.

    Args:
        own_checkpoint: the run's newest checkpoint, which describes the model if the starting weights are gone; None for none.

    Raises:
        UserError: the last checkpoint would be saved for Hugging Face, but lack the tensors that are carried along.
    """
    assets, made = (find_assets(Path(config.model.hf_assets_path)), {}) if config.model.hf_assets_path else ((), byte_tokenizer_files())
    start = start_folder(config)
    if start is not None and not start.is_dir():
        start = own_checkpoint
    carried = _carried(start)
    if carried is not None:
        logger.info(f"{start}: {carried}")
        if config.checkpoint.last_save_in_hf:
            raise UserError(
                "checkpoint.last_save_in_hf is true, but that folder would lack the tensors that are carried along; allowed: false "
                "(refine-titan convert to-hf writes them too)"
            )
    if is_path(config.model.name, config.model.flavor):
        return ModelDescription(_with_options(ModelConfig.read(config.model.flavor), config), assets, carried, made)
    if start is not None and (start / CONFIG_FILE).is_file():
        return ModelDescription(_with_options(ModelConfig.read(start), config), assets, carried, made)
    ids = {key: getattr(tokenizer, name, None) for key, name in (("bos_token_id", "bos_id"), ("eos_token_id", "eos_id"))}
    known = {key: value for key, value in ids.items() if value is not None}
    return ModelDescription(json_bytes(args.to_hf_config() | known | {"dtype": config.training.dtype}), assets, carried, made)


def _carried(start: Path | None) -> CarriedTensors | None:
    """The tensors that a checkpoint has besides those of the model."""
    if start is None:
        return None
    if (start / METADATA_FILE).is_file():
        return CarriedTensors.of_dcp(start)
    return CarriedTensors.of_hf(HFWeights(start), ModelConfig.read(start))


def _with_options(described: ModelConfig, config: JobConfig) -> bytes:
    """The `config.json` with the values of `model.options`; the same bytes if they change nothing in it."""
    values = json.loads(described.raw)
    written = type(described.args).with_overrides(values, read_options(config.model.options, type(described.args)))
    return described.raw if written == values else json_bytes(written)


def _read_start(config: JobConfig, args: DecoderArgs, folder: Path, setting: str) -> ModelConfig:
    """Reads the `config.json` of the weights from which a run starts, with the values of `model.options`.

    Raises:
        UserError: it describes another model than the run's; the message names the differences.
    """
    try:
        start = ModelConfig.read(folder / CONFIG_FILE)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    name, flavor = config.model.name, config.model.flavor
    if start.family_name != name:
        raise UserError(f"{setting}: {folder} is of the family {start.family_name!r}, but model.name is {name!r}")
    start = start.with_options(config.model.options)
    different = differences(start.args, args)
    if different:
        raise UserError(f"{setting}: {folder} is not a {name} {flavor}: {', '.join(different)}")
    return start
