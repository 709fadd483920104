"""Puts folders of Hugging Face's cache in place of the names of the Hub that settings hold, each at one commit."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_titan.config.reading import DATASET_PREFIX
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.files.limits import read_small_file
from refine_titan.hub.cache import Wanted
from refine_titan.hub.names import SETTINGS, HubName, hub_name
from refine_titan.hub.together import Companions

# torchtitan's logger too.
logger = logging.getLogger()

DATASETS = ("data.source", "evaluation.perplexity_source")
# Words of `data.source` that are no paths; they have no slash, so that no name is like them.
START = "checkpoint.initial_load_path"


def resolve_names(config: JobConfig, resumes: bool, companions: Companions | None = None) -> JobConfig:
    """The settings with a folder of the cache in place of a model's name, and `owner/name@commit` in place of a data set's.

    A run that resumes keeps the commits that its `config.json` has, for names without a revision, and does not fetch the weights from
    which it once started. A name as `checkpoint.initial_load_path` means a Hugging Face folder (`checkpoint.initial_load_in_hf`).

    Args:
        resumes: whether the run has checkpoints of its own.
        companions: the ranks of the run; None for those of the environment.

    Raises:
        UserError: a name stands for nothing that can be had; the message names the setting.
    """
    names = {f"{section}.{name}": _named(getattr(getattr(config, section), name), f"{section}.{name}") for section, name in SETTINGS}
    names = {setting: name for setting, name in names.items() if name is not None}
    if not names:
        return config
    if resumes:
        recorded = _recorded(Path(config.job.dump_folder))
        names = {setting: _as_recorded(name, recorded.get(setting)) for setting, name in names.items()}
    values: dict[str, str | bool] = {}
    if START in names:
        values["checkpoint.initial_load_in_hf"] = True
        if resumes:
            values[START] = str(names.pop(START))
    starts_from_assets = config.checkpoint.initial_load_in_hf and not config.checkpoint.initial_load_path and not resumes
    wanted = [
        Wanted(
            setting,
            name,
            "dataset" if setting in DATASETS else "model",
            weights=setting == START or (setting == "model.hf_assets_path" and starts_from_assets),
        )
        for setting, name in names.items()
    ]
    companions = companions or Companions.from_environment()
    told: dict[HubName, list[str]] = {}
    for item, (commit, folder) in zip(wanted, companions.fetch(wanted)):
        pinned = HubName(item.name.repository, commit)
        told.setdefault(pinned, []).append(item.setting)
        prefix = DATASET_PREFIX if item.kind == "dataset" else ""
        values[item.setting] = str(folder) if folder is not None else f"{prefix}{pinned}"
    for pinned, settings in told.items() if companions.rank == 0 else ():
        logger.info(f"{pinned.repository} at the commit {pinned.revision[:12]} of the Hub: {', '.join(settings)}")
    return _with(config, values)


def _named(value: str | None, setting: str) -> HubName | None:
    """The name that a setting holds, which for a data set may stand behind a prefix."""
    return hub_name((value or "").removeprefix(DATASET_PREFIX) if setting in DATASETS else value)


def _as_recorded(asked: HubName, recorded: Any) -> HubName:
    """The name at the commit with which the run began, unless another revision is asked for."""
    began = hub_name(recorded.removeprefix(DATASET_PREFIX)) if isinstance(recorded, str) else None
    if asked.revision is None and began is not None and began.repository == asked.repository and began.is_pinned:
        return began
    return asked


def _recorded(folder: Path) -> dict[str, Any]:
    """The values of a run's `config.json`; none if it cannot be read, which whoever compares settings says better."""
    try:
        settings = json.loads(read_small_file(folder / "config.json"))
        return {f"{section}.{name}": settings.get(section, {}).get(name) for section, name in SETTINGS}
    except (OSError, ValueError, AttributeError, RecursionError, UserError):
        return {}


def _with(config: JobConfig, values: dict[str, str | bool]) -> JobConfig:
    for setting, value in values.items():
        section, name = setting.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def model_folder(text: str, setting: str, weights: bool = False, companions: Companions | None = None) -> Path:
    """The folder that a command's argument names: a local path, or what the cache holds of `owner/name`.

    Args:
        setting: the argument, for messages.
        weights: whether the weights are wanted, beside `config.json` and the tokenizer's files.

    Raises:
        UserError: the name stands for nothing that can be had. A path is not checked.
    """
    name = hub_name(text)
    if name is None:
        return Path(text)
    companions = companions or Companions.from_environment()
    [(commit, folder)] = companions.fetch([Wanted(setting, name, weights=weights)])
    if companions.rank == 0:
        logger.info(f"{name.repository} at the commit {commit[:12]} of the Hub: {setting}")
    return folder
