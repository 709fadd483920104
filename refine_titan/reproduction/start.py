"""The start of an experiment, from random weights: `start.toml`, and stages that follow it, such as one on longer documents.

Forks count the steps of all stages: with 900 steps of `start.toml`, fork 1,000 is step 100 of `start_2.toml`.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from refine_titan.config.reading import check_settings, read_toml
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.reproduction.settings import Settings, determines_training, digest, merged
from refine_titan.reproduction.trainings import Training, load_settings, loading

START, NEXT_START = "start.toml", "start_{}.toml"


def read_settings(path: Path) -> Settings:
    """Reads a file of settings; raises UserError if one has a wrong name or type."""
    values = read_toml(path)
    check_settings(values, str(path))
    return values


@dataclass(frozen=True)
class Start:
    """The trainings from random weights up to the forks.

    Attributes:
        name: the experiment's name.
        folder: the experiment's folder.
        output: folder of its runs.
        planned: the forks of `arms.toml`; empty for the last step.
        arms: that file.
    """

    name: str
    folder: Path
    output: Path
    planned: tuple[int, ...]
    arms: Path

    @cached_property
    def files(self) -> list[Path]:
        found, number = [self.folder / START], 2
        while (path := self.folder / NEXT_START.format(number)).is_file():
            found.append(path)
            number += 1
        return found

    @cached_property
    def values(self) -> list[Settings]:
        return [read_settings(path) for path in self.files]

    @cached_property
    def configs(self) -> list[JobConfig]:
        """The settings of each stage."""
        return [load_settings(values, str(path)) for values, path in zip(self.values, self.files)]

    @cached_property
    def forks(self) -> tuple[int, ...]:
        """Steps that arms go on from; raises UserError if a stage does not keep one."""
        forks = self.planned or (self._ends[-1],)
        for fork in forks:
            number = self._stage_of(fork)
            kept = self._kept(number)
            if fork not in kept:
                config, before = self.configs[number], f", after {self._begin(number):,} steps of earlier stages" if number else ""
                raise UserError(
                    f"{self.arms}: forks holds {fork}, whose checkpoint is not kept; {self.files[number].name} keeps "
                    f"{_shortened(kept)} (training.steps = {config.training.steps}, checkpoint.interval = {config.checkpoint.interval}, "
                    f"keep_latest_k = {config.checkpoint.keep_latest_k}{before})"
                )
        return forks

    @cached_property
    def trainings(self) -> list[Training]:
        """The stages as far as the last fork needs them. Where the schedule of its learning rate allows it, the last stage ends with
        that fork and goes on when a later one is asked for."""
        made: list[Training] = []
        last = self._stage_of(self.forks[-1])
        for number in range(last + 1):
            config, begin = self.configs[number], self._begin(number)
            steps = tuple(fork - begin for fork in self.forks if self._stage_of(fork) == number)
            determined = determines_training(config)
            ends_early = _is_prefix_of_longer(config, steps[0] if steps else config.training.steps)
            if ends_early:
                del determined["settings"]["training"]["steps"]
            if not ends_early or number < last:
                steps = (*(step for step in steps if step < config.training.steps), config.training.steps)
            own, origin = {"training": {"steps": steps[-1]}}, None
            if len(steps) > 1:
                # An interrupted run writes a checkpoint more, for which keep_latest_k would remove the first fork.
                own["checkpoint"] = {"keep_latest_k": 0}
            if made:
                origin = (made[-1], made[-1].steps[-1])
                determined["checkpoint"] = made[-1].identity(made[-1].steps[-1])
                own = merged(own, loading(*origin))
            stem = self.files[number].stem
            folder = self.output / f"{stem}-{digest(determined)}"
            made.append(Training(f"{self.name}/{stem}", folder, merged(self.values[number], own), config, steps, origin, of_start=True))
        return made

    def checkpoint_of(self, fork: int) -> tuple[Training, int]:
        """The stage that has a fork, and the checkpoint's step in it."""
        number = self._stage_of(fork)
        return self.trainings[number], fork - self._begin(number)

    @cached_property
    def _ends(self) -> list[int]:
        """Steps from random weights at the end of each stage."""
        return list(accumulate(config.training.steps for config in self.configs))

    def _begin(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _stage_of(self, fork: int) -> int:
        """Number of the stage that has a fork; the last one for a fork behind its end."""
        return next((number for number, end in enumerate(self._ends) if fork <= end), len(self._ends) - 1)

    def _kept(self, number: int) -> list[int]:
        config, begin = self.configs[number].checkpoint, self._begin(number)
        last = self.configs[number].training.steps
        kept = sorted({*range(config.interval, last + 1, config.interval), last})[-config.keep_latest_k :]
        return [begin + step for step in kept]


def _is_prefix_of_longer(config: JobConfig, first: int) -> bool:
    """Whether the run's first steps are those of a run with more steps: its learning rate does not depend on their number."""
    schedule = config.lr_scheduler
    return schedule.decay_ratio == 0 and schedule.total_steps is None and schedule.warmup_steps <= first


def _shortened(steps: list[int]) -> str:
    shown = [*map(str, steps)] if len(steps) <= 8 else [*map(str, steps[:4]), "...", *map(str, steps[-2:])]
    return ", ".join(shown)
