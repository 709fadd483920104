"""Decides which checkpoint and tokenizer an evaluation uses."""

from dataclasses import replace
from pathlib import Path

from refine_titan.checkpointing import complete_steps
from refine_titan.config.sections import JobConfig
from refine_titan.conversion.description import has_tokenizer
from refine_titan.data.tokenizer import load_tokenizer, tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.hub.settings import model_folder
from refine_titan.hub.together import Companions


def resolve_checkpoint(config: JobConfig, checkpoint: Path | None, companions: Companions | None = None) -> Path:
    """Returns the folder that is asked for, fetched from the Hub if it is a name there, or the last checkpoint of the config's run.

    Args:
        companions: the ranks that fetch together; None for those of the environment.

    Raises:
        UserError: if there is no such folder or checkpoint.
    """
    if checkpoint is not None:
        folder = model_folder(str(checkpoint), "--checkpoint", weights=True, companions=companions)
        if not folder.is_dir():
            raise UserError(f"--checkpoint is {str(checkpoint)!r}; allowed: an existing folder, or a model of the Hub (owner/name)")
        return folder
    folder = Path(config.job.dump_folder, config.checkpoint.folder)
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"--checkpoint is not given, and the config's run has no checkpoint in {folder}")
    return folder / f"step-{max(steps)}"


def with_tokenizer(config: JobConfig, checkpoint: Path) -> JobConfig:
    """Sets `model.hf_assets_path` to the checkpoint's folder if that holds a tokenizer and the config names none.

    Raises:
        UserError: if the config names another tokenizer than the checkpoint's. Every token would mean something else.
    """
    if not has_tokenizer(checkpoint):
        return config
    assets = config.model.hf_assets_path
    if assets and has_tokenizer(Path(assets)):
        own, named = (load_tokenizer(folder, "model.hf_assets_path") for folder in (str(checkpoint), assets))
        if tokenizer_sha256(own) != tokenizer_sha256(named):
            raise UserError(
                f"model.hf_assets_path is {assets!r}, whose tokenizer is not the one that {checkpoint} was trained with; leave "
                "the setting out, and the checkpoint's own is used"
            )
        return config
    return replace(config, model=replace(config.model, hf_assets_path=str(checkpoint)))
