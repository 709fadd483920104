"""A training of an experiment: its settings, its folder, and the checkpoints that are needed of it."""

from dataclasses import dataclass
from pathlib import Path

from refine_titan.checkpointing import complete_steps
from refine_titan.config.batch_plan import plan_batch
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.reproduction.settings import Settings
from refine_titan.validation import load_config


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
        of_start: whether it is a stage of the start, which all arms go on from.
    """

    name: str
    folder: Path
    values: Settings
    config: JobConfig
    steps: tuple[int, ...]
    origin: "tuple[Training, int] | None" = None
    of_start: bool = False

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

    def line(self) -> "list[Training]":
        """This training and those that it goes on from, back to random weights."""
        return [self, *([] if self.origin is None else self.origin[0].line())]

    def since_start(self) -> "list[Training]":
        """This training and those that it goes on from, back to the start; none for the start itself."""
        return [training for training in self.line() if not training.of_start]


def load_settings(values: Settings, where: str) -> JobConfig:
    """Resolves the settings of a training.

    Raises:
        UserError: naming `where`: a setting is wrong, or counts epochs.
    """
    try:
        config = load_config([], values=values)
        if config.training.epochs:
            raise UserError(f"training.epochs is {config.training.epochs}; an experiment counts training.steps")
        plan_batch(config, 1)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def loading(training: Training, step: int) -> Settings:
    """Settings by which another training begins with the weights of a checkpoint."""
    return {"checkpoint": {"initial_load_path": str(training.checkpoint(step)), "initial_load_in_hf": False}}
