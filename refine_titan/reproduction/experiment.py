"""What the small-scale reproduction runs: a model trained from random weights, then continued in two ways from that checkpoint."""

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
# What is compared: the checkpoint itself, and continued with refine.objective.
ARMS = {"start": "the checkpoint", "ntp": "+ next-token training", "refine": "+ ReFINE"}
OBJECTIVES = ("ntp", "refine")


@dataclass(frozen=True)
class Experiment:
    """One model's comparison.

    Attributes:
        folder: holds start.toml and continue.toml; its name is the experiment's.
        output: where its runs and evaluations go.
        seeds: each gives a continuation its own documents and rollouts, and its evaluation its own samples.
    """

    folder: Path
    output: Path
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def evaluation(self, arm: str, seed: int) -> Path:
        return self.output / "evaluation" / f"{arm}_seed_{seed}"

    def run_folder(self, arm: str, seed: int) -> Path:
        """A run's dump folder; the start's is one for all seeds."""
        return self.output / arm if arm == "start" else self.output / f"{arm}_seed_{seed}"

    def configs(self) -> tuple[JobConfig, JobConfig]:
        """Raises UserError if a file is missing or wrong."""
        missing = [name for name in (START, CONTINUE) if not (self.folder / name).is_file()]
        if missing:
            raise UserError(f"{self.folder} holds no {' and no '.join(missing)}; an experiment is a folder with {START} and {CONTINUE}")
        start, further = (load_config(["--job.config_file", str(self.folder / name)]) for name in (START, CONTINUE))
        if not further.evaluation.tasks or not further.evaluation.lengths:
            raise UserError(f"{self.folder / CONTINUE}: [evaluation] names no tasks or no lengths to compare on")
        return start, further

    def check_samples(self) -> None:
        """Generates what the evaluations of all seeds will ask at the shortest lengths, for nothing but this: one without room for a
        sample would else be found when all the training is over.

        Raises:
            UserError: if a task cannot have its samples, or its files are missing.
        """
        _, config = self.configs()
        tokenizer, lengths = build_tokenizer(config), config.evaluation.lengths
        # Samples of a task differ by a few percent in what they need: where one of the shortest fits, all twice as long do.
        shortest = [length for length in lengths if length < 2 * min(lengths)]
        with TemporaryDirectory() as scratch:
            for seed in self.seeds:
                settings = replace(config.evaluation, seed=seed, lengths=shortest, dump_folder=scratch)
                try:
                    load_tasks(replace(config, evaluation=settings), tokenizer)
                except UserError as error:
                    raise UserError(f"{self.folder / CONTINUE}: [evaluation] with seed {seed}: {error}") from error

    def stages(self) -> list[Stage]:
        start, further = self.configs()
        checkpoint = self._checkpoint("start", 0, start)
        first = self._training("start", self.folder / START, self.run_folder("start", 0), checkpoint)
        stages = [first]
        for seed in self.seeds:
            for arm in OBJECTIVES:
                stages += self._continuation(arm, seed, further, checkpoint, first.name)
            stages.append(self._evaluating("start", seed, checkpoint, first.name))
        return stages

    def _continuation(self, arm: str, seed: int, config: JobConfig, start: Path, needed: str) -> Iterator[Stage]:
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
        stage = self._training(name, self.folder / CONTINUE, self.run_folder(arm, seed), checkpoint, options, (needed,))
        yield stage
        yield self._evaluating(arm, seed, checkpoint, stage.name)

    def _checkpoint(self, arm: str, seed: int, config: JobConfig) -> Path:
        return self.run_folder(arm, seed) / config.checkpoint.folder / f"step-{config.training.steps}"

    def _training(
        self, name: str, config: Path, folder: Path, checkpoint: Path, options: Sequence[str] = (), needs: tuple[str, ...] = ()
    ) -> Stage:
        step = int(checkpoint.name.removeprefix("step-"))
        return Stage(
            f"{self.name}/{name}",
            (sys.executable, "-m", "refine_titan.train", "--job.config_file", str(config), "--job.dump_folder", str(folder), *options),
            lambda: step in complete_steps(checkpoint.parent),
            needs,
        )

    def _evaluating(self, arm: str, seed: int, checkpoint: Path, needed: str) -> Stage:
        folder = self.evaluation(arm, seed)
        command = (
            sys.executable,
            "tools/evaluate.py",
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
