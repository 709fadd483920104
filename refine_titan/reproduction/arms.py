"""Reads `arms.toml` or another file of its kind: the arms that are compared, from which checkpoints, over which seeds, by what."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from refine_titan.config.reading import check_settings, read_toml
from refine_titan.config.type_checks import describe, did_you_mean, in_toml, matches
from refine_titan.errors import UserError
from refine_titan.reproduction.settings import Settings, flat, nested

ARMS_FILE = "arms.toml"
# The checkpoint that arms go on from, among the arms.
FORK = "fork"
FORK_LABEL = "the checkpoint"
MEASURES = ("ruler", "text")
Matched = Literal["steps", "tokens", "compute"]
# Settings that say what a measure's samples are, besides those of [data] and [model].
DEFINE_SAMPLES = frozenset(
    {
        "training.seq_len",
        *(f"evaluation.{name}" for name in ("tasks", "lengths", "num_samples", "seed", "data_folder", "essay_folder", "perplexity_source")),
    }
)


@dataclass(frozen=True)
class Arm:
    """One way to go on from a checkpoint.

    Attributes:
        name: its key in `arms.toml`.
        label: its name in tables and charts.
        settings: replace those of `continue.toml` in its training.
        measured_with: replace those of `continue.toml` when its checkpoints are measured.
        train: False for an arm that is the checkpoint that it goes on from, measured with other settings.
        after: the arm whose checkpoint of the same seed it goes on from; None for the start's.
        forks: the forks that it runs from; empty for all.
    """

    name: str
    label: str
    settings: Settings
    measured_with: Settings
    train: bool = True
    after: str | None = None
    forks: tuple[int, ...] = ()

    def is_at(self, fork: int) -> bool:
        return not self.forks or fork in self.forks


@dataclass(frozen=True)
class Comparison:
    """An arm against another one.

    Attributes:
        matched: what the two must have equal; None if nothing.
        label: the comparison's name in tables and charts, if it has one of its own.
    """

    arm: str
    against: str
    matched: Matched | None = None
    label: str = ""


@dataclass(frozen=True)
class Plan:
    """What `arms.toml` asks for, or the chosen part of it.

    Attributes:
        arms: the arms by name, in the order of tables.
        baseline: name of the arm that others are compared with.
        measures: kinds of measures that every checkpoint gets, of `MEASURES`.
        primary: the measure that decides, such as `text/match_uniform_5`.
        forks: steps of the start's run that arms go on from; empty for its last step.
        seeds: each gives every arm its own documents and rollouts, and every measure its own samples.
        comparisons: which differences are estimated.
        left_out: number of the file's comparisons that were not chosen. Intervals and p values are corrected for them too, since who has
            seen all may choose the best.
        missing: seeds that were asked for and are not finished; as long as there is one, every answer is undecided.
        text: options of `refine-titan evaluate text`, such as `sequences`.
        path: the file that says so.
    """

    arms: dict[str, Arm]
    baseline: str
    measures: tuple[str, ...]
    primary: str
    forks: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    comparisons: tuple[Comparison, ...] = ()
    left_out: int = 0
    missing: tuple[int, ...] = ()
    text: dict[str, int] = field(default_factory=dict)
    path: Path = Path(ARMS_FILE)

    def chosen(self, arms: Sequence[str] | None, forks: Sequence[int] | None, seeds: Sequence[int] | None) -> "Plan":
        """The part of the plan with these arms, those that they are compared with, the baseline and the arms that these go on from; None
        for all. Arms that run from none of the forks are left out.

        Raises:
            UserError: an arm or a fork is not in the plan.
        """
        for name in arms or ():
            if name not in self.arms:
                raise UserError(f"--arms names {name!r}{did_you_mean(name, self.arms)}; {self.path.name} has {', '.join(self.arms)}")
        for fork in forks or ():
            if fork not in self.forks:
                raise UserError(f"--forks names {fork}; {self.path.name} has forks = {list(self.forks)}")
        rivals = {pair.against for pair in self.comparisons if pair.arm in (arms or ())} - {FORK}
        wanted = set(self.arms) if arms is None else {self.baseline, *arms, *rivals}
        for name in [*wanted]:
            wanted |= set(self.origins(name))
        left = self.forks if forks is None else tuple(fork for fork in self.forks if fork in forks)
        for name in arms or ():
            if left and not any(map(self.arms[name].is_at, left)):
                raise UserError(
                    f"--arms names {name!r}, which runs from none of the forks {list(left)}; it has forks = {list(self.arms[name].forks)}"
                )
        kept = {name: arm for name, arm in self.arms.items() if name in wanted and (not left or any(map(arm.is_at, left)))}
        known = {FORK, *kept}
        chosen = replace(
            self,
            arms=kept,
            forks=left,
            seeds=self.seeds if seeds is None else tuple(seeds),
            comparisons=tuple(pair for pair in self.comparisons if {pair.arm, pair.against} <= known),
        )
        return replace(chosen, left_out=self.left_out + self.num_comparisons - chosen.num_comparisons)

    @property
    def num_comparisons(self) -> int:
        """Number of the comparisons at all forks."""
        if not self.forks:
            return len(self.comparisons)
        return sum(self.compared_at(pair, fork) for fork in self.forks for pair in self.comparisons)

    def origins(self, name: str) -> list[str]:
        """The arms that an arm goes on from, the nearest first."""
        found: list[str] = []
        while (after := self.arms[name].after) is not None:
            found.append(after)
            name = after
        return found

    def compared_at(self, pair: Comparison, fork: int) -> bool:
        """Whether both arms of a comparison run from a fork."""
        return all(name == FORK or self.arms[name].is_at(fork) for name in (pair.arm, pair.against))

    def label(self, name: str) -> str:
        return FORK_LABEL if name == FORK else self.arms[name].label


# Keys of the file, of an arm and of a comparison, with their types.
KEYS = {
    "forks": list[int],
    "seeds": list[int],
    "baseline": str,
    "measures": list[str],
    "primary": str,
    "arms": dict,
    "comparisons": list[dict],
    "text": dict,
}
ARM_KEYS = {"label": str, "settings": dict, "measured_with": dict, "train": bool, "after": str, "forks": list[int]}
TEXT_KEYS = {"sequences": int, "length": int, "ngram": int, "beyond": int}
COMPARISON_KEYS = {"arm": str, "against": str, "matched": Matched, "label": str}


def read_plan(path: Path) -> Plan:
    """Reads an experiment's `arms.toml`, or another file of arms.

    Raises:
        UserError: naming the key or value that is wrong.
    """
    values = read_toml(path)
    _check_keys(values, KEYS, str(path), required=("baseline", "measures", "primary", "arms"))
    arms = {name: _arm(path, name, value) for name, value in values["arms"].items()}
    plan = Plan(
        arms=arms,
        baseline=values["baseline"],
        measures=tuple(values["measures"]),
        primary=values["primary"],
        forks=tuple(values.get("forks", ())),
        seeds=tuple(values.get("seeds", Plan.seeds)),
        text=values.get("text", {}),
        path=path,
    )
    _check_keys(plan.text, TEXT_KEYS, f"{path}: [text]")
    _check_plan(plan, path)
    pairs = values.get("comparisons", [{"arm": name, "against": plan.baseline} for name in arms if name != plan.baseline])
    comparisons = tuple(_comparison(path, number, value, plan) for number, value in enumerate(pairs, start=1))
    return replace(plan, comparisons=comparisons)


def check_seeds(seeds: Sequence[int], where: str) -> None:
    """Raises UserError unless seeds are different numbers from 1."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 1:
        raise UserError(f"{where} is {list(seeds)}; allowed: different numbers from 1")


def _check_plan(plan: Plan, path: Path) -> None:
    if not plan.arms:
        raise UserError(f"{path}: there is no arm; allowed: a table [arms.NAME] for each")
    if plan.baseline not in plan.arms:
        raise UserError(f"{path}: baseline is {plan.baseline!r}{did_you_mean(plan.baseline, plan.arms)}; allowed: {', '.join(plan.arms)}")
    for measure in plan.measures:
        if measure not in MEASURES:
            raise UserError(f"{path}: measures holds {measure!r}{did_you_mean(measure, MEASURES)}; allowed: {', '.join(MEASURES)}")
    if not plan.measures or len(set(plan.measures)) < len(plan.measures):
        raise UserError(f"{path}: measures is {in_toml(list(plan.measures))}; allowed: one or several of {', '.join(MEASURES)}")
    kind = "text" if plan.primary.startswith("text/") else "ruler"
    if kind not in plan.measures:
        raise UserError(
            f"{path}: primary is {plan.primary!r}, which the measure {kind!r} gives; measures is {in_toml(list(plan.measures))}"
        )
    check_seeds(plan.seeds, f"{path}: seeds")
    if list(plan.forks) != sorted(set(plan.forks)) or any(fork < 1 for fork in plan.forks):
        raise UserError(f"{path}: forks is {list(plan.forks)}; allowed: rising numbers from 1")
    for name, arm in plan.arms.items():
        if arm.after is not None and arm.after not in plan.arms:
            raise UserError(f"{path}: [arms.{name}] after is {arm.after!r}{did_you_mean(arm.after, plan.arms)}")
        _check_forks(plan, arm, path)
        seen = {name}
        while (arm := plan.arms.get(arm.after)) is not None:
            if arm.name in seen:
                raise UserError(f"{path}: [arms.{name}] goes on after itself")
            seen.add(arm.name)


def _check_forks(plan: Plan, arm: Arm, path: Path) -> None:
    where = f"{path}: [arms.{arm.name}] forks is {list(arm.forks)}"
    if not set(arm.forks) <= set(plan.forks):
        raise UserError(f"{where}; allowed: some of forks = {list(plan.forks)}")
    if arm.forks and arm.name == plan.baseline:
        raise UserError(f"{where}, but it is the baseline, which runs from all forks; leave it out")
    origin = plan.arms.get(arm.after)
    if origin is not None and not all(origin.is_at(fork) for fork in arm.forks or plan.forks):
        own = f"forks is {list(arm.forks)}" if arm.forks else "runs from all forks"
        raise UserError(f"{path}: [arms.{arm.name}] {own}, but {arm.after!r}, which it goes on after, has forks = {list(origin.forks)}")


def _arm(path: Path, name: str, value: Any) -> Arm:
    where = f"{path}: [arms.{name}]"
    if name == FORK or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise UserError(f"{where}: an arm's name has letters, digits, - and _, and is not {FORK!r}, which is the checkpoint itself")
    if not isinstance(value, dict):
        raise UserError(f"{where} is {in_toml(value)}; allowed: a table")
    _check_keys(value, ARM_KEYS, where)
    settings, measured_with = (_settings(value.get(key, {}), f"{where} {key}") for key in ("settings", "measured_with"))
    train = value.get("train", True)
    if settings and not train:
        raise UserError(f"{where} has train = false and settings, which only its training would read; allowed: measured_with")
    _check_sections(settings, measured_with, where)
    if "seed" in settings.get("debug", {}) or "initial_load_path" in settings.get("checkpoint", {}):
        raise UserError(f"{where} settings: debug.seed and checkpoint.initial_load_path come from the seed and the fork; leave them out")
    return Arm(name, value.get("label", name), settings, measured_with, train, value.get("after"), tuple(value.get("forks", ())))


def _check_sections(settings: Settings, measured_with: Settings, where: str) -> None:
    """Raises UserError for settings that would have no effect, or with which an arm would be measured on other samples than the rest."""
    if "evaluation" in settings and "validation" not in settings:
        raise UserError(f"{where} settings has 'evaluation', which its training does not read; put it into measured_with or continue.toml")
    samples = sorted(name for name in flat(measured_with) if name.startswith(("data.", "model.")) or name in DEFINE_SAMPLES)
    if samples:
        raise UserError(f"{where} measured_with has {samples[0]!r}, but all arms are measured on the same samples; set it in continue.toml")


def _settings(values: dict[str, Any], where: str) -> Settings:
    settings = nested(values, where)
    check_settings(settings, where)
    return settings


def _comparison(path: Path, number: int, value: dict[str, Any], plan: Plan) -> Comparison:
    where = f"{path}: comparison {number}"
    _check_keys(value, COMPARISON_KEYS, where, required=("arm", "against"))
    names = [FORK, *plan.arms]
    for key in ("arm", "against"):
        if value[key] not in names:
            raise UserError(f"{where}: {key} is {value[key]!r}{did_you_mean(value[key], names)}; allowed: {', '.join(names)}")
    if value["arm"] == value["against"]:
        raise UserError(f"{where} has arm = against = {value['arm']!r}; allowed: two different arms")
    comparison = Comparison(value["arm"], value["against"], value.get("matched"), value.get("label", ""))
    if plan.forks and not any(plan.compared_at(comparison, fork) for fork in plan.forks):
        raise UserError(f"{where}: {value['arm']!r} and {value['against']!r} have no fork in common")
    return comparison


def _check_keys(values: dict[str, Any], keys: dict[str, Any], where: str, required: Sequence[str] = ()) -> None:
    for key, value in values.items():
        if key not in keys:
            known = f"; known: {', '.join(keys)}"
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, keys) or known}")
        if not matches(value, keys[key]):
            kinds = {dict: "a table", list[dict]: "tables [[comparisons]]"}
            raise UserError(f"{where}: {key} is {in_toml(value)}; allowed: {kinds.get(keys[key]) or describe(keys[key])}")
    missing = [key for key in required if key not in values]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} is missing")
