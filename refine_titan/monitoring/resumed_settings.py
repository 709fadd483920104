"""What becomes of settings that have changed since the run that is resumed: each setting's declaration says it (`config/fates.py`)."""

import json
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple

from refine_titan.config.fates import Fate, fates
from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import in_toml
from refine_titan.errors import UserError
from refine_titan.files.limits import read_small_file
from refine_titan.files.whole_files import write_atomically
from refine_titan.hub.names import with_names
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig
from refine_titan.models.sizes import differences, resolve_args
from refine_titan.monitoring.run_folder import read_settings

# Settings that the learning rate of a step depends on, beside those of [lr_scheduler].
SCHEDULE = ("optimizer.lr", "training.steps")
# What `checkpoint.exclude_from_loading` can name.
EXCLUDED = {"optimizer": "the optimizer's moments", "lr_scheduler": "the learning-rate schedule", "dataloader": "the data"}
# The file in the folder of a run that says after which step `checkpoint.exclude_from_loading` was obeyed.
BEGUN_ANEW = "begun_anew.json"


class Change(NamedTuple):
    """A setting with another value than in the run that is resumed."""

    name: str
    old: Any
    new: Any
    fate: Fate

    def __str__(self) -> str:
        return f"{self.name}: {in_toml(self.old)} -> {in_toml(self.new)}"


def resumed_settings(config: JobConfig, step: int) -> list[str]:
    """Says which new values train from here on, and what begins anew, in a run that goes on after `step`.

    Raises:
        UserError: if the run cannot go on with a setting, naming it with both values.
    """
    folder, next_step = Path(config.job.dump_folder), step + 1
    changes = changed_settings(read_settings(folder), config)
    refused = [change for change in changes if change.fate is Fate.REFUSED]
    if refused:
        name, old, new, _ = refused[0]
        raise UserError(
            f"{name} is {in_toml(new)}; allowed: {in_toml(old)}, with which the run in {folder} was begun. Another job.dump_folder "
            "begins another run"
        )
    _refuse_other_model(config, folder / config.checkpoint.folder / f"step-{step}", changes)
    asked, excluded = config.checkpoint.exclude_from_loading, parts_to_begin_anew(config, step)
    applying = {Fate.APPLIES, Fate.SAME_MODEL} | ({Fate.SAME_DATA} if "dataloader" in excluded else set())
    applied = [change for change in changes if change.fate in applying and change.name != "checkpoint.exclude_from_loading"]
    lines = []
    if excluded:
        lines.append(f"Begins anew at step {next_step}: {_in_words(excluded)}")
    elif asked:
        begun = _step_begun_anew(folder) + 1
        lines.append(f"Goes on with {_in_words(asked)} as begun anew at step {begun}; remove {folder / BEGUN_ANEW} to begin anew once more")
    if applied:
        lines.append(f"Changed settings apply from step {next_step} on: {'; '.join(map(str, applied))}")
    if "lr_scheduler" not in excluded and any(change.name.startswith("lr_scheduler.") or change.name in SCHEDULE for change in applied):
        lines.append(f"The learning-rate schedule of the changed settings takes over at step {next_step}")
    return lines


def parts_to_begin_anew(config: JobConfig, step: int) -> list[str]:
    """What of `checkpoint.exclude_from_loading` a run that goes on after `step` does not load: nothing if a start with the same settings
    has begun it anew before that step, so that a command that is started again goes on.

    Raises:
        UserError: a file in the run's folder is damaged.
    """
    folder, asked = Path(config.job.dump_folder), config.checkpoint.exclude_from_loading
    begun = _step_begun_anew(folder) if asked else None
    if begun is None or step <= begun:
        return asked
    settings = read_settings(folder)
    is_same = bool(settings) and all(change.fate is Fate.NO_EFFECT for change in changed_settings(settings, config))
    return [] if is_same else asked


def record_new_beginning(folder: Path, step: int) -> None:
    """Writes down that parts have begun anew after `step`, for starts with the settings of `config.json`, which is to be written next."""
    write_atomically(folder / BEGUN_ANEW, json.dumps({"step": step}) + "\n")


def _step_begun_anew(folder: Path) -> int | None:
    path = folder / BEGUN_ANEW
    if not path.exists():
        return None
    try:
        return int(json.loads(read_small_file(path))["step"])
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to begin anew what checkpoint.exclude_from_loading names") from error


def _in_words(parts: list[str]) -> str:
    return ", ".join(EXCLUDED[name] for name in EXCLUDED if name in parts)


def changed_settings(old: dict[str, Any], config: JobConfig) -> list[Change]:
    """The settings that differ from those of `old`, a run's `config.json`; a setting that it lacks is not compared."""
    new = with_names(json.loads(json.dumps(config.to_dict(), default=str)))
    changes = []
    for name, fate in fates(type(config)).items():
        before, now = _look_up(old, name), _look_up(new, name)
        if before is not MISSING and before != now:
            changes.append(Change(name, before, now, fate))
    return changes


def _look_up(settings: dict[str, Any], name: str) -> Any:
    value = settings
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def _refuse_other_model(config: JobConfig, checkpoint: Path, changes: list[Change]) -> None:
    """Compares the models themselves, so that a `config.json` may lie elsewhere than before."""
    if not (checkpoint / CONFIG_FILE).is_file():
        for name, old, new, fate in changes:
            if fate is Fate.SAME_MODEL:
                raise UserError(
                    f"{name} is {in_toml(new)}; allowed: {in_toml(old)}, since {checkpoint} has no {CONFIG_FILE} to compare models by"
                )
        return
    described, name = ModelConfig.read(checkpoint), config.model.name
    if described.family_name != name:
        raise UserError(f"model.name is {name!r}; allowed: {described.family_name!r}, the family of {checkpoint}")
    different = differences(described.args, resolve_args(config.model))
    if different:
        raise UserError(f"model.flavor is {config.model.flavor!r}; {checkpoint} is another {name}: {', '.join(different)}")
