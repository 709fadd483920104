"""What torchtitan 0.2.2's CheckpointManager leaves open about resuming; its private parts are used here only."""

import shutil
from pathlib import Path

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.tools.logging import logger

from refine_titan.errors import UserError


def resume_step(checkpointer: CheckpointManager, load_step: int) -> int | None:
    """The step that loading will resume from, or None for a fresh start. Removes what a killed run left half-written.

    The manager loads `initial_load_path` only if the checkpoint folder does not exist. A run killed during its very first
    write leaves a folder without a complete checkpoint, and the next start would silently train from random weights.

    Raises:
        UserError: if `load_step` names no complete checkpoint, or later ones exist, which training would overwrite
            while they still look complete.
    """
    if not checkpointer.enable:
        return None
    folder = Path(checkpointer.folder)
    if dist.get_rank() == 0:
        _remove_incomplete(folder)
    dist.barrier()
    latest = checkpointer._find_load_step()
    if load_step == -1:
        return None if latest == -1 else latest
    if not (folder / f"step-{load_step}" / ".metadata").is_file():
        complete = sorted(_step(path) for path in folder.glob("step-*")) if folder.is_dir() else []
        raise UserError(f"checkpoint.load_step is {load_step}; {folder} has the steps {complete}")
    if latest > load_step and not checkpointer.load_only:
        raise UserError(
            f"checkpoint.load_step is {load_step}, but {folder} goes on to step {latest}, which this run would overwrite; move "
            f"the later checkpoints away, or start in another job.dump_folder with checkpoint.initial_load_path = "
            f"'{folder}/step-{load_step}'"
        )
    return load_step


def _remove_incomplete(folder: Path) -> None:
    """DCP writes `.metadata` last, by renaming, after everything else is on disk: without it a checkpoint is incomplete."""
    if not folder.is_dir():
        return
    for path in folder.glob("step-*"):
        if not (path / ".metadata").is_file() and not (path / "model.safetensors.index.json").is_file():
            logger.warning(f"Removing {path}: its writing was interrupted")
            shutil.rmtree(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
