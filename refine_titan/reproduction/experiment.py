"""Defines an experiment: a model is trained from random weights, arms go on from its checkpoints, and every checkpoint is measured."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from refine_titan.checkpointing import complete_steps
from refine_titan.config.batch_plan import plan_batch
from refine_titan.config.reading import check_settings, read_toml
from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.work import load_tasks
from refine_titan.files.whole_files import write_atomically
from refine_titan.reproduction.arms import ARMS_FILE, FORK, Arm, Plan, read_plan
from refine_titan.reproduction.settings import Settings, determines_measures, determines_training, digest, merged, toml_text
from refine_titan.reproduction.stages import Stage
from refine_titan.validation import load_config

START, CONTINUE = "start.toml", "continue.toml"
# What runs a kind of measure, `refine-titan evaluate ...`, and the file that it writes.
EVALUATIONS = {"ruler": ("run", "results.json"), "text": ("text", "measures.json")}


@dataclass(frozen=True)
class Training:
    """A training of an experiment.

    Attributes:
        name: the stage's name.
        folder: the run's folder, whose name ends with what stands for everything that the weights depend on.
        values: its settings by section.
        config: the same settings, resolved.
        steps: steps whose checkpoints are needed, rising; it ends with the last of them.
        origin: the training whose checkpoint it goes on from, and the checkpoint's step; None for random weights.
    """

    name: str
    folder: Path
    values: Settings
    config: JobConfig
    steps: tuple[int, ...]
    origin: "tuple[Training, int] | None" = None

    def checkpoint(self, step: int) -> Path:
        return self.folder / self.config.checkpoint.folder / f"step-{step}"

    def is_done(self) -> bool:
        return set(self.steps) <= set(complete_steps(self.folder / self.config.checkpoint.folder))

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.steps[-1] * plan_batch(self.config, 1).sequences * self.config.training.seq_len

    def identity(self, step: int) -> list[str | int]:
        """What stands for the weights of a checkpoint."""
        return [self.folder.name, step]


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder and the chosen part of its plan.

    Attributes:
        folder: holds `start.toml`, `continue.toml` and `arms.toml`, and gives the experiment its name.
        output: folder of its runs and measures.
        plan: arms, forks, seeds and measures.
    """

    folder: Path
    output: Path
    plan: Plan

    @classmethod
    def read(cls, folder: Path, output: Path) -> "Experiment":
        """Reads an experiment's folder; raises UserError if a file is missing or `arms.toml` is wrong."""
        missing = [name for name in (START, CONTINUE, ARMS_FILE) if not (folder / name).is_file()]
        if missing:
            names = f"{START}, {CONTINUE} and {ARMS_FILE}"
            raise UserError(f"{folder} holds no {' and no '.join(missing)}; an experiment is a folder with {names}")
        return cls(folder, output, read_plan(folder))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """What is measured at every fork: the fork itself and the arms."""
        return (FORK, *self.plan.arms)

    @cached_property
    def start_values(self) -> Settings:
        return self._file_values(START)

    @cached_property
    def continue_values(self) -> Settings:
        return self._file_values(CONTINUE)

    @cached_property
    def start_config(self) -> JobConfig:
        return self._load(self.start_values, str(self.folder / START))

    @cached_property
    def continue_config(self) -> JobConfig:
        """The settings of `continue.toml`; raises UserError if they name nothing to measure."""
        config = self._load(self.continue_values, str(self.folder / CONTINUE))
        if "ruler" in self.plan.measures and not (config.evaluation.tasks and config.evaluation.lengths):
            raise UserError(f"{self.folder / CONTINUE}: [evaluation] names no tasks or no lengths, which the measure 'ruler' needs")
        return config

    @cached_property
    def arm_configs(self) -> dict[str, JobConfig]:
        """The settings of each arm's training, which is that of `continue.toml` for an arm that trains not."""
        where = f"{self.folder / ARMS_FILE}: [arms.{{}}] settings"
        return {name: self._load(merged(self.continue_values, arm.settings), where.format(name)) for name, arm in self.plan.arms.items()}

    @cached_property
    def measure_configs(self) -> dict[str, JobConfig]:
        """The settings by which an arm's checkpoint, or the fork, is measured."""
        where = f"{self.folder / ARMS_FILE}: [arms.{{}}] measured_with"
        own = {name: arm.measured_with for name, arm in self.plan.arms.items()}
        return {FORK: self.continue_config} | {
            name: self._load(merged(self.continue_values, values), where.format(name)) if values else self.continue_config
            for name, values in own.items()
        }

    @cached_property
    def _training_facts(self) -> dict[str, Settings]:
        return {name: determines_training(config) for name, config in self.arm_configs.items()}

    @cached_property
    def _measure_facts(self) -> dict[str, Settings]:
        return {name: determines_measures(config) for name, config in self.measure_configs.items()}

    @cached_property
    def forks(self) -> tuple[int, ...]:
        """Steps of the start's run that arms go on from; raises UserError if its run does not keep one."""
        config, last = self.start_config.checkpoint, self.start_config.training.steps
        forks = self.plan.forks or (last,)
        kept = sorted({*range(config.interval, last + 1, config.interval), last})[-config.keep_latest_k :]
        for fork in forks:
            if fork not in kept:
                raise UserError(
                    f"{self.folder / ARMS_FILE}: forks holds {fork}, whose checkpoint is not kept; {START} keeps {_shortened(kept)} "
                    f"(training.steps = {last}, checkpoint.interval = {config.interval}, keep_latest_k = {config.keep_latest_k})"
                )
        return forks

    @cached_property
    def start(self) -> Training:
        """The training from random weights. Where the schedule of its learning rate allows it, it ends with the last fork and goes on
        when a later one is asked for."""
        config, steps = self.start_config, self.forks
        determined = determines_training(config)
        if _is_prefix_of_longer(config, self.forks[0]):
            del determined["settings"]["training"]["steps"]
        else:
            steps = (*(fork for fork in self.forks if fork < config.training.steps), config.training.steps)
        folder = self.output / f"start-{digest(determined)}"
        return Training(f"{self.name}/start", folder, merged(self.start_values, {"training": {"steps": steps[-1]}}), config, steps)

    def training(self, fork: int, arm: str, seed: int) -> tuple[Training, int]:
        """The training whose checkpoint an arm is measured by, and the checkpoint's step; that of the start for the fork."""
        if arm == FORK:
            return self.start, fork
        origin = self.training(fork, self.plan.arms[arm].after or FORK, seed)
        return self._continuation(self.plan.arms[arm], fork, seed, origin) if self.plan.arms[arm].train else origin

    def measure_folder(self, fork: int, arm: str, seed: int, measure: str) -> Path:
        """Folder of a measure of an arm's checkpoint."""
        training, step = self.training(fork, arm, seed)
        options = {"options": self.plan.text} if measure == "text" else {}
        determined = {"measure": measure, **options, "checkpoint": training.identity(step), "seed": seed, **self._measure_facts[arm]}
        return self._fork_folder(fork) / f"{arm}_seed_{seed}-{measure}-{digest(determined)}"

    def stages(self) -> list[Stage]:
        """Lists the processes: the start, and for each seed and fork the trainings of the arms and the measures of all checkpoints."""
        return [self._training_stage(self.start), *(stage for seed in self.plan.seeds for stage in self._stages_of(seed))]

    def finished_seeds(self) -> tuple[int, ...]:
        """The seeds of which all stages are done."""
        return tuple(seed for seed in self.plan.seeds if all(stage.is_done() for stage in self._stages_of(seed)))

    def check(self) -> None:
        """Checks what the files say of each other.

        Raises:
            UserError: trainings that `arms.toml` says are matched have not the same number of steps, or of tokens; or a training reads
                documents that the others hold out for the measures.
        """
        configs = [self.start_config, self.continue_config, *self.arm_configs.values()]
        held_out = {(config.data.source, config.data.holdout_percent) for config in configs}
        sources = {source for source, _ in held_out}
        if "text" in self.plan.measures and len(held_out) > len(sources):
            shares = sorted({share for _, share in held_out})
            raise UserError(
                f"{self.folder}: data.holdout_percent is {' and '.join(f'{share:g}' for share in shares)} in trainings on the same "
                "data.source; allowed: the same number, so that no training reads what is measured"
            )
        for number, pair in enumerate(self.plan.comparisons, start=1):
            arm, against = (self._length(name) for name in (pair.arm, pair.against))
            if pair.matched in ("steps", "tokens") and arm[pair.matched] != against[pair.matched]:
                raise UserError(
                    f"{self.folder / ARMS_FILE}: comparison {number} is matched in {pair.matched}, but {pair.arm!r} has "
                    f"{arm[pair.matched]:,} and {pair.against!r} has {against[pair.matched]:,}"
                )

    def _length(self, name: str) -> dict[str, int]:
        """Steps and tokens of an arm's trainings after the fork."""
        trainings, seed = [], self.plan.seeds[0]
        training, _ = self.training(self.forks[0], name, seed)
        while training.origin is not None:
            trainings.append(training)
            training, _ = training.origin
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

    def _file_values(self, name: str) -> Settings:
        values = read_toml(self.folder / name)
        check_settings(values, str(self.folder / name))
        return values

    def _load(self, values: Settings, where: str) -> JobConfig:
        try:
            config = load_config([], values=values)
            if config.training.epochs:
                raise UserError(f"training.epochs is {config.training.epochs}; an experiment counts training.steps")
            plan_batch(config, 1)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return config

    def _fork_folder(self, fork: int) -> Path:
        return self.output / f"fork_{fork}"

    def _continuation(self, arm: Arm, fork: int, seed: int, origin: tuple[Training, int]) -> tuple[Training, int]:
        config, (before, step) = self.arm_configs[arm.name], origin
        determined = {"checkpoint": before.identity(step), "seed": seed, **self._training_facts[arm.name]}
        folder = self._fork_folder(fork) / f"{arm.name}_seed_{seed}-{digest(determined)}"
        given = {
            "debug": {"seed": seed},
            "checkpoint": {"initial_load_path": str(before.checkpoint(step)), "initial_load_in_hf": False},
        }
        name = f"{self.name}/fork_{fork}/{arm.name}_seed_{seed}"
        values, last = merged(self.continue_values, arm.settings, given), config.training.steps
        return Training(name, folder, values, config, (last,), origin), last

    def _stages_of(self, seed: int) -> Iterator[Stage]:
        for fork in self.forks:
            for arm in self.checkpoints:
                training, step = self.training(fork, arm, seed)
                if training is not self.start and self.plan.arms[arm].train:
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


def _is_prefix_of_longer(config: JobConfig, first: int) -> bool:
    """Whether the run's first steps are those of a run with more steps: its learning rate does not depend on their number."""
    schedule = config.lr_scheduler
    return schedule.decay_ratio == 0 and schedule.total_steps is None and schedule.warmup_steps <= first


def _shortened(steps: list[int]) -> str:
    shown = [*map(str, steps)] if len(steps) <= 8 else [*map(str, steps[:4]), "...", *map(str, steps[-2:])]
    return ", ".join(shown)
