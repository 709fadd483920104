"""Defines an experiment: a model is trained from random weights, arms go on from its checkpoints, and every checkpoint is measured."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.text.job import TextOptions
from refine_titan.evaluation.work import load_tasks
from refine_titan.files.whole_files import write_atomically
from refine_titan.reproduction.arms import ARMS_FILE, FORK, Arm, Plan, read_plan
from refine_titan.reproduction.settings import Settings, determines_measures, determines_training, digest, merged, toml_text
from refine_titan.reproduction.stages import Stage
from refine_titan.reproduction.start import START, Start, read_settings
from refine_titan.reproduction.trainings import Training, load_settings, loading

CONTINUE = "continue.toml"
# What runs a kind of measure, `refine-titan evaluate ...`, and the file that it writes.
EVALUATIONS = {"ruler": ("run", "results.json"), "text": ("text", "measures.json")}


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder and the chosen part of its plan.

    Attributes:
        folder: holds `start.toml` and its further stages, `continue.toml` and `arms.toml`, and gives the experiment its name.
        output: folder of its runs and measures.
        plan: arms, forks, seeds and measures.
    """

    folder: Path
    output: Path
    plan: Plan

    @classmethod
    def read(cls, path: Path, output: Path) -> "Experiment":
        """Reads an experiment's folder, with `arms.toml`, or one of its other files of arms.

        Raises:
            UserError: a file is missing, or that of the arms is wrong.
        """
        if not path.exists():
            raise UserError(f"{path}: no such folder of an experiment, and no such file of arms")
        folder, arms = (path.parent, path.name) if path.is_file() else (path, ARMS_FILE)
        missing = [name for name in (START, CONTINUE, arms) if not (folder / name).is_file()]
        if missing:
            names = f"{START}, {CONTINUE} and {arms}"
            raise UserError(f"{folder} holds no {' and no '.join(missing)}; an experiment is a folder with {names}")
        return cls(folder, output, read_plan(folder / arms))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def title(self) -> str:
        """Its name in reports: that of the folder, with the file of arms if it is another one than `arms.toml`."""
        return self.name if self.plan.path.name == ARMS_FILE else f"{self.name}/{self.plan.path.stem}"

    @property
    def figure(self) -> Path:
        """The file of the main figure."""
        return self.output / ("figure.svg" if self.plan.path.name == ARMS_FILE else f"figure_{self.plan.path.stem}.svg")

    @cached_property
    def start(self) -> Start:
        return Start(self.name, self.folder, self.output, self.plan.forks, self.plan.path)

    @property
    def forks(self) -> tuple[int, ...]:
        """Steps of the start that arms go on from; raises UserError if its run does not keep one."""
        return self.start.forks

    def checkpoints(self, fork: int) -> tuple[str, ...]:
        """What is measured at a fork: the fork itself and its arms."""
        return (FORK, *(name for name, arm in self.plan.arms.items() if arm.is_at(fork)))

    @cached_property
    def continue_values(self) -> Settings:
        return read_settings(self.folder / CONTINUE)

    @cached_property
    def continue_config(self) -> JobConfig:
        """The settings of `continue.toml`; raises UserError if they name nothing to measure."""
        config = load_settings(self.continue_values, str(self.folder / CONTINUE))
        if "ruler" in self.plan.measures and not (config.evaluation.tasks and config.evaluation.lengths):
            raise UserError(f"{self.folder / CONTINUE}: [evaluation] names no tasks or no lengths, which the measure 'ruler' needs")
        return config

    @cached_property
    def arm_configs(self) -> dict[str, JobConfig]:
        """The settings of each arm's training, which is that of `continue.toml` for an arm that trains not."""
        where = f"{self.plan.path}: [arms.{{}}] settings"
        return {name: load_settings(merged(self.continue_values, arm.settings), where.format(name)) for name, arm in self.plan.arms.items()}

    @cached_property
    def measure_configs(self) -> dict[str, JobConfig]:
        """The settings by which an arm's checkpoint, or the fork, is measured."""
        where = f"{self.plan.path}: [arms.{{}}] measured_with"
        own = {name: arm.measured_with for name, arm in self.plan.arms.items()}
        return {FORK: self.continue_config} | {
            name: load_settings(merged(self.continue_values, values), where.format(name)) if values else self.continue_config
            for name, values in own.items()
        }

    @cached_property
    def _training_facts(self) -> dict[str, Settings]:
        return {name: determines_training(config) for name, config in self.arm_configs.items()}

    @cached_property
    def _measure_facts(self) -> dict[str, Settings]:
        return {name: determines_measures(config) for name, config in self.measure_configs.items()}

    def training(self, fork: int, arm: str, seed: int) -> tuple[Training, int]:
        """The training whose checkpoint an arm is measured by, and the checkpoint's step; that of the start for the fork."""
        if arm == FORK:
            return self.start.checkpoint_of(fork)
        origin = self.training(fork, self.plan.arms[arm].after or FORK, seed)
        return self._continuation(self.plan.arms[arm], fork, seed, origin) if self.plan.arms[arm].train else origin

    def measure_folder(self, fork: int, arm: str, seed: int, measure: str) -> Path:
        """Folder of a measure of an arm's checkpoint."""
        training, step = self.training(fork, arm, seed)
        options = {"options": self.plan.text} if measure == "text" else {}
        determined = {"measure": measure, **options, "checkpoint": training.identity(step), "seed": seed, **self._measure_facts[arm]}
        return self._fork_folder(fork) / f"{arm}_seed_{seed}-{measure}-{digest(determined)}"

    def start_stages(self) -> list[Stage]:
        """The processes of the start."""
        return [self._training_stage(training) for training in self.start.trainings]

    def arm_stages(self) -> list[Stage]:
        """The other processes: for each seed and fork the trainings of the arms and the measures of all checkpoints."""
        return [stage for seed in self.plan.seeds for stage in self._stages_of(seed)]

    def finished_seeds(self) -> tuple[int, ...]:
        """The seeds of which all stages are done."""
        return tuple(seed for seed in self.plan.seeds if all(stage.is_done() for stage in self._stages_of(seed)))

    def check(self) -> None:
        """Checks what the files say of each other.

        Raises:
            UserError: a seed is that of the start; trainings that `arms.toml` says are matched have not the same number of steps, or of
                tokens; or the measure of text cannot be one of held-out text.
        """
        for config, file in zip(self.start.configs, self.start.files):
            if config.debug.seed in self.plan.seeds:
                raise UserError(
                    f"seeds holds {config.debug.seed}, which is debug.seed of {file}; allowed: others, which draw other documents"
                )
        if "text" in self.plan.measures:
            self._check_text()
        for number, pair in enumerate(self.plan.comparisons, start=1):
            fork = next((fork for fork in self.forks if self.plan.compared_at(pair, fork)), None)
            if fork is None or pair.matched not in ("steps", "tokens"):
                continue
            arm, against = (self._length(fork, name)[pair.matched] for name in (pair.arm, pair.against))
            if arm != against:
                raise UserError(
                    f"{self.plan.path}: comparison {number} is matched in {pair.matched}, but {pair.arm!r} has {arm:,} and "
                    f"{pair.against!r} has {against:,}"
                )

    def _check_text(self) -> None:
        """Raises UserError if the measure of text would read what was trained on, ignore an arm's settings, or has a wrong option."""
        config = self.continue_config
        configs = [*self.start.configs, config, *self.arm_configs.values()]
        held_out = {(config.data.source, config.data.holdout_percent) for config in configs}
        sources = {source for source, _ in held_out}
        if len(held_out) > len(sources):
            shares = sorted({share for _, share in held_out})
            raise UserError(
                f"{self.folder}: data.holdout_percent is {' and '.join(f'{share:g}' for share in shares)} in trainings on the same "
                "data.source; allowed: the same number, so that no training reads what is measured"
            )
        if not (config.data.holdout_percent or config.evaluation.perplexity_source or config.data.source == "synthetic"):
            raise UserError(
                f"{self.folder / CONTINUE}: data.holdout_percent is 0, so that the measure 'text' would read documents of the training; "
                "allowed: a share above 0 in all trainings, or evaluation.perplexity_source"
            )
        for name, own in self.measure_configs.items():
            if own.refine.phase == "ttt":
                raise UserError(
                    f"{self.plan.path}: [arms.{name}] is measured with refine.phase = 'ttt', but the measure 'text' adapts no weights; "
                    "allowed: measures = ['ruler']"
                )
        TextOptions(**{name: value for name, value in self.plan.text.items() if name != "length"})

    def _length(self, fork: int, name: str) -> dict[str, int]:
        """Steps and tokens of an arm's trainings after the fork."""
        training, _ = self.training(fork, name, self.plan.seeds[0])
        trainings = training.since_start()
        return {"steps": sum(t.steps[-1] for t in trainings), "tokens": sum(t.tokens for t in trainings)}

    def check_samples(self) -> None:
        """Checks that every task can be generated or loaded, before the training begins.

        Otherwise a length without room for a sample would be found only after the training. Samples are generated for all seeds
        at the shortest lengths, and thrown away.

        Raises:
            UserError: if samples of a task cannot be generated, or its files are missing.
        """
        config = self.continue_config
        if "ruler" not in self.plan.measures:
            return
        tokenizer, lengths = build_tokenizer(config), config.evaluation.lengths
        # The tokens that a task's samples need differ by a few percent, so lengths from twice the shortest on have room.
        shortest = [length for length in lengths if length < 2 * min(lengths)]
        with TemporaryDirectory() as scratch:
            for seed in self.plan.seeds:
                settings = replace(config.evaluation, seed=seed, lengths=shortest, dump_folder=scratch)
                try:
                    load_tasks(replace(config, evaluation=settings), tokenizer)
                except UserError as error:
                    raise UserError(f"{self.folder / CONTINUE}: [evaluation] with seed {seed}: {error}") from error

    def _fork_folder(self, fork: int) -> Path:
        return self.output / f"fork_{fork}"

    def _continuation(self, arm: Arm, fork: int, seed: int, origin: tuple[Training, int]) -> tuple[Training, int]:
        config, (before, step) = self.arm_configs[arm.name], origin
        determined = {"checkpoint": before.identity(step), "seed": seed, **self._training_facts[arm.name]}
        folder = self._fork_folder(fork) / f"{arm.name}_seed_{seed}-{digest(determined)}"
        given = {"debug": {"seed": seed}} | loading(before, step)
        name = f"{self.name}/fork_{fork}/{arm.name}_seed_{seed}"
        values, last = merged(self.continue_values, arm.settings, given), config.training.steps
        return Training(name, folder, values, config, (last,), origin), last

    def _stages_of(self, seed: int) -> Iterator[Stage]:
        for fork in self.forks:
            for arm in self.checkpoints(fork):
                training, step = self.training(fork, arm, seed)
                if arm != FORK and self.plan.arms[arm].train:
                    yield self._training_stage(training)
                for measure in self.plan.measures:
                    yield self._measure_stage(fork, arm, seed, measure, training, step)

    def _training_stage(self, training: Training) -> Stage:
        return Stage(
            training.name,
            (*_PROGRAM, "train", str(_settings_file(training.folder)), "--job.dump_folder", str(training.folder)),
            training.is_done,
            () if training.origin is None else (training.origin[0].name,),
            lambda: _write_settings(training.folder, training.values),
            training.folder,
        )

    def _measure_stage(self, fork: int, arm: str, seed: int, measure: str, training: Training, step: int) -> Stage:
        command, result = EVALUATIONS[measure]
        folder = self.measure_folder(fork, arm, seed, measure)
        own = {} if arm == FORK else self.plan.arms[arm].measured_with
        return Stage(
            f"{self.name}/fork_{fork}/{arm}_seed_{seed}.{measure}",
            (
                *(*_PROGRAM, "evaluate", command, str(_settings_file(folder)), "--checkpoint", str(training.checkpoint(step))),
                *("--seed", str(seed), "--output", str(folder), "--job.dump_folder", str(self.output)),
                *((word for name, value in self.plan.text.items() for word in (f"--{name}", str(value))) if measure == "text" else ()),
            ),
            (folder / result).is_file,
            (training.name,),
            lambda: _write_settings(folder, merged(self.continue_values, own)),
            folder,
        )


_PROGRAM = (sys.executable, "-m", "refine_titan")


def _settings_file(folder: Path) -> Path:
    """The file of a stage's settings, beside its folder: an evaluation begins in an empty one."""
    return folder.with_name(f"{folder.name}.toml")


def _write_settings(folder: Path, values: Settings) -> None:
    write_atomically(_settings_file(folder), toml_text(values))
