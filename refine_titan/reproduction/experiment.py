"""Defines an experiment: a model is trained from random weights, and its checkpoint is then continued in two ways."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from refine_titan.checkpointing import complete_steps
from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.work import load_tasks
from refine_titan.reproduction.stages import Stage
from refine_titan.validation import load_config

START, CONTINUE = "start.toml", "continue.toml"
# The arms of the comparison and their labels: the checkpoint itself, and its continuations by refine.objective.
ARMS = {"start": "the checkpoint", "ntp": "+ next-token training", "refine": "+ ReFINE"}
OBJECTIVES = ("ntp", "refine")


@dataclass(frozen=True)
class Experiment:
    """The comparison for one model.

    Attributes:
        folder: holds start.toml and continue.toml, and gives the experiment its name.
        output: folder of its runs and evaluations.
        seeds: seeds of the continuations. Each has its own documents and rollouts, and its evaluation its own samples.
    """

    folder: Path
    output: Path
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def evaluation_folder(self, arm: str, seed: int) -> Path:
        """Folder of the evaluation of an arm's checkpoint."""
        return self.output / "evaluation" / f"{arm}_seed_{seed}"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Dump folder of an arm's training run. All seeds share that of the start."""
        return self.output / arm if arm == "start" else self.output / f"{arm}_seed_{seed}"

    def configs(self) -> tuple[JobConfig, JobConfig]:
        """Loads start.toml and continue.toml; raises UserError if one is missing or wrong."""
        missing = [name for name in (START, CONTINUE) if not (self.folder / name).is_file()]
        if missing:
            raise UserError(f"{self.folder} holds no {' and no '.join(missing)}; an experiment is a folder with {START} and {CONTINUE}")
        start, further = (load_config(["--job.config_file", str(self.folder / name)]) for name in (START, CONTINUE))
        if not further.evaluation.tasks or not further.evaluation.lengths:
            raise UserError(f"{self.folder / CONTINUE}: [evaluation] names no tasks or no lengths to compare on")
        return start, further

    def check_samples(self) -> None:
        """Checks that every task can be generated or loaded, before the training begins.

        Otherwise a length without room for a sample would be found only after the training. Samples are generated for all seeds
        at the shortest lengths, and thrown away.

        Raises:
            UserError: if samples of a task cannot be generated, or its files are missing.
        """
        _, config = self.configs()
        tokenizer, lengths = build_tokenizer(config), config.evaluation.lengths
        # The tokens that a task's samples need differ by a few percent, so lengths from twice the shortest on have room.
        shortest = [length for length in lengths if length < 2 * min(lengths)]
        with TemporaryDirectory() as scratch:
            for seed in self.seeds:
                settings = replace(config.evaluation, seed=seed, lengths=shortest, dump_folder=scratch)
                try:
                    load_tasks(replace(config, evaluation=settings), tokenizer)
                except UserError as error:
                    raise UserError(f"{self.folder / CONTINUE}: [evaluation] with seed {seed}: {error}") from error

    def stages(self) -> list[Stage]:
        """Lists the processes: the start, and for each seed its two continuations and the evaluations of all three checkpoints."""
        start, further = self.configs()
        checkpoint = self._checkpoint("start", 0, start)
        first = self._training_stage("start", self.folder / START, self.run_folder("start", 0), checkpoint)
        stages = [first]
        for seed in self.seeds:
            for arm in OBJECTIVES:
                stages += self._continuation_stages(arm, seed, further, checkpoint, first.name)
            stages.append(self._evaluation_stage("start", seed, checkpoint, first.name))
        return stages

    def _continuation_stages(self, arm: str, seed: int, config: JobConfig, start: Path, needed: str) -> Iterator[Stage]:
        name = f"{arm}_seed_{seed}"
        options = (
            "--refine.objective",
            arm,
            "--debug.seed",
            str(seed),
            "--checkpoint.no-initial_load_in_hf",
            "--checkpoint.initial_load_path",
            str(start),
        )
        checkpoint = self._checkpoint(arm, seed, config)
        stage = self._training_stage(name, self.folder / CONTINUE, self.run_folder(arm, seed), checkpoint, options, (needed,))
        yield stage
        yield self._evaluation_stage(arm, seed, checkpoint, stage.name)

    def _checkpoint(self, arm: str, seed: int, config: JobConfig) -> Path:
        return self.run_folder(arm, seed) / config.checkpoint.folder / f"step-{config.training.steps}"

    def _training_stage(
        self, name: str, config: Path, folder: Path, checkpoint: Path, options: Sequence[str] = (), needs: tuple[str, ...] = ()
    ) -> Stage:
        step = int(checkpoint.name.removeprefix("step-"))
        return Stage(
            f"{self.name}/{name}",
            (sys.executable, "-m", "refine_titan", "train", "--job.config_file", str(config), "--job.dump_folder", str(folder), *options),
            lambda: step in complete_steps(checkpoint.parent),
            needs,
        )

    def _evaluation_stage(self, arm: str, seed: int, checkpoint: Path, needed: str) -> Stage:
        folder = self.evaluation_folder(arm, seed)
        command = (
            sys.executable,
            "-m",
            "refine_titan",
            "evaluate",
            "run",
            str(self.folder / CONTINUE),
            "--checkpoint",
            str(checkpoint),
            "--seed",
            str(seed),
            "--output",
            str(folder),
            "--job.dump_folder",
            str(self.output),
        )
        name = f"{self.name}/evaluate_{arm}_seed_{seed}"
        return Stage(name, command, lambda: (folder / "results.json").is_file(), (needed,))
