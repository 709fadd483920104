"""What a setting's new value does when a run resumes, declared beside the setting or, for a whole section, above its class.

    seed: Annotated[int, at_least(0), REFUSED] = 42

`monitoring/resumed_settings.py` acts on it; `docs/configuration.md` shows it.
"""

import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum

from refine_titan.config.bounds import Unsupported, bounds_of


class Fate(Enum):
    """What the new value of a setting does when a run resumes; `fate.value` is the word for it in the documentation."""

    APPLIES = "applies"
    """It trains from the next step on, and the run says so."""

    REFUSED = "refused"
    """The run does not go on."""

    SAME_MODEL = "same model"
    """The run goes on if the model is the checkpoint's all the same."""

    SAME_DATA = "same data"
    """The run goes on if the data are the checkpoint's all the same, or begin anew (`checkpoint.exclude_from_loading`)."""

    NO_EFFECT = "no effect"
    """Nothing that is trained depends on it, but for the rounding of sums in another order."""


APPLIES, REFUSED, SAME_MODEL, SAME_DATA, NO_EFFECT = Fate


def on_resume(fate: Fate) -> Callable[[type], type]:
    """Decorates a section's dataclass with the fate of its settings that declare none themselves, and of the sections in it."""

    def decorate(section: type) -> type:
        section.__fate__ = fate
        return section

    return decorate


def fates(section: type, prefix: str = "", default: Fate | None = None) -> dict[str, Fate]:
    """The fate of every setting of a section's class, by name; of those that are supported.

    Raises:
        ValueError: if a setting has none.
    """
    found, default = {}, getattr(section, "__fate__", default)
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if is_dataclass(hint):
            found |= fates(hint, f"{prefix}{name}.", default)
        elif not any(isinstance(bound, Unsupported) for bound in bounds_of(hint)):
            declared = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Fate)]
            if not declared and default is None:
                raise ValueError(f"{prefix}{name} has no fate on resume")
            found[prefix + name] = declared[0] if declared else default
    return found
