"""Weights & Biases: torchtitan's logger (0.2.2), with one run over all starts. Needs the extra `wandb`."""

import os
from collections.abc import Mapping
from pathlib import Path

import wandb
from torchtitan.components.metrics import WandBLogger
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.files.whole_files import write_atomically

# The caller's own values stay. torchtitan's logger reads further ones: WANDB_TEAM, WANDB_RUN_NAME, WANDB_RUN_GROUP, ...
DEFAULTS = {"WANDB_PROJECT": "refine_titan", "WANDB_RESUME": "allow", "WANDB_SILENT": "true"}
ID_FILE = "wandb_run_id"


class WeightsAndBiases(WandBLogger):
    """Logs to the run whose id is in the folder, or to a new one."""

    def __init__(self, folder: Path, config: JobConfig):
        """
        Raises:
            OSError: the id cannot be read or written.
            UserError: Weights & Biases refuses the run.
        """
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        id_file = folder / ID_FILE
        if id_file.is_file():
            os.environ.setdefault("WANDB_RUN_ID", id_file.read_text(encoding="utf-8").strip())
        try:
            super().__init__(str(folder), config)
        except wandb.errors.Error as error:
            raise UserError(f"metrics.enable_wandb: Weights & Biases refuses the run: {error}") from error
        run = self.wandb.run
        write_atomically(id_file, run.id + "\n")
        place = run.url if run.url else f"offline, `wandb sync {Path(run.dir).parent}` sends it"
        logger.info(f"Weights & Biases: run {run.id} of {run.project} ({place})")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs the numbers of a step. Steps that the run has from an earlier start are not sent again; it could not replace them."""
        if step >= self.wandb.run.step:
            super().log(dict(metrics), step)
