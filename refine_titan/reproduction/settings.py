"""Settings of a stage: those of an experiment's file with an arm's own over them, as a TOML file and as what determines a result."""

import hashlib
import json
import platform
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refine_titan.config.reading import DATASET_PREFIX, PATHS
from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import in_toml
from refine_titan.errors import UserError

Settings = dict[str, Any]
"""Settings by section, as a TOML file has them: `{"refine": {"objective": "ntp"}}`."""

# Files up to this size count by their content, larger ones by their size and time of change.
LARGEST_READ = 1 << 28
# Sections that change nothing that is trained.
NOT_TRAINING = frozenset({"job", "metrics", "profiling", "evaluation", "text", "validation"})
# Sections that change nothing that is measured, and those of them that test-time training reads.
NOT_MEASURING = frozenset(
    {"job", "metrics", "profiling", "validation", "checkpoint", "optimizer", "lr_scheduler", "activation_checkpoint", "posttrain", "debug"}
)
ADAPTING = frozenset({"optimizer", "activation_checkpoint"})
# Settings of [training] that change nothing that is measured; test-time training reads the last two.
TRAINING_ONLY = ("steps", "epochs", "global_batch_size", "local_batch_size", "max_norm")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def nested(settings: Settings, where: str) -> Settings:
    """Settings by section, of settings whose keys may have dots: `{"refine.objective": "ntp"}`.

    Raises:
        UserError: a setting is there twice.
    """
    found: Settings = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{where}: {key!r} is a setting of {section!r}, which has a value of its own there")
        if isinstance(value, dict):
            value = nested(value, where)
            place[name] = merged(place.get(name, {}), value)
        elif name in place:
            raise UserError(f"{where}: {key!r} is there twice")
        else:
            place[name] = value
    return found


def merged(*given: Settings) -> Settings:
    """Settings of which later ones replace earlier ones, setting by setting."""
    result: Settings = {}
    for settings in given:
        for key, value in settings.items():
            is_section = isinstance(value, dict) and isinstance(result.get(key, {}), dict)
            result[key] = merged(result.get(key, {}), value) if is_section else value
    return result


def flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Settings by name: `{"refine.objective": "ntp"}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def as_words(settings: Settings) -> str:
    """Settings as a reader writes them: `refine.objective = 'ntp', training.steps = 124`."""
    return ", ".join(f"{name} = {in_toml(value)}" for name, value in flat(settings).items())


def toml_text(settings: Settings, names: tuple[str, ...] = ()) -> str:
    """Writes settings by section as TOML, with a table for each section."""
    own = [f"{_key(key)} = {_value(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    head = [f"[{'.'.join(map(_key, names))}]"] if names and own else []
    tables = [toml_text(value, (*names, key)) for key, value in settings.items() if isinstance(value, dict)]
    parts = ["\n".join([*head, *own]) + "\n"] if own else []
    return "\n".join([*parts, *(table for table in tables if table)])


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    # A string of JSON is one of TOML, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else in_toml(value)


def determines_training(config: JobConfig) -> dict[str, Any]:
    """What the weights that a training ends with depend on, besides those that it starts from."""
    sections = {name: section for name, section in asdict(config).items() if name not in NOT_TRAINING}
    return {"settings": sections, "files": _files(config, sections)}


def determines_measures(config: JobConfig) -> dict[str, Any]:
    """What the measures of a checkpoint depend on, besides the checkpoint."""
    adapts = config.refine.phase == "ttt"
    left_out = NOT_MEASURING - ADAPTING if adapts else NOT_MEASURING
    sections = {name: section for name, section in asdict(config).items() if name not in left_out}
    of_training = TRAINING_ONLY[:3] if adapts else TRAINING_ONLY
    sections["training"] = {name: value for name, value in sections["training"].items() if name not in of_training}
    return {"settings": sections, "files": _files(config, sections)}


def digest(value: Any) -> str:
    """Ten hexadecimal digits that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _files(config: JobConfig, sections: Collection[str]) -> dict[str, str]:
    """What stands for the content of the files and folders that settings of these sections name."""
    found = {}
    for section, name in PATHS:
        value = getattr(getattr(config, section), name)
        if section in sections and value and (section, name) != ("evaluation", "dump_folder"):
            path = Path(value.removeprefix(DATASET_PREFIX))
            if path.exists():
                found[f"{section}.{name}"] = _content(path)
    if config.data.source == "python-stdlib":
        found["data.source"] = f"Python {platform.python_version()}"
    if "evaluation" in sections:
        found |= {f"evaluation.tasks {task}": _content(Path(task)) for task in config.evaluation.tasks if Path(task).exists()}
    return found


def _content(path: Path) -> str:
    if path.is_dir():
        return digest({str(file.relative_to(path)): _content(file) for file in sorted(path.rglob("*")) if file.is_file()})
    stat = path.stat()
    if stat.st_size > LARGEST_READ:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
