"""Safe resuming, which torchtitan 0.2.2's CheckpointManager lacks. Only this file uses its private parts."""

import functools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan.components.checkpoint as titan_checkpoint
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import DATALOADER, CheckpointManager
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from refine_titan.conversion.dcp_checksums import METADATA_FILE, ChecksumWriter
from refine_titan.conversion.dcp_entries import PlainLoadPlanner, check_entries
from refine_titan.conversion.dcp_metadata import CheckedReader, DamagedCheckpoint, data_file_problems
from refine_titan.conversion.description import ModelDescription
from refine_titan.errors import UserError
from refine_titan.files.reasons import is_about_a_file, reason
from refine_titan.models.hf_weights import INDEX_FILE


def guard_dcp(*, in_one_process: bool) -> None:
    """Makes the manager load without running code from a checkpoint, and in a run of one process save and load without collectives.

    With collectives, gloo's worker threads stay alive after the first save, and every later step is 1.7 times slower (torch 2.13.0,
    2 cores, two such threads), with 14,000 voluntary context switches per step instead of 120. The likely cause: gloo's threads start
    OpenMP teams, after which libgomp counts more threads than cores and lets idle threads sleep.

    Args:
        in_one_process: whether the run has one process, on a CPU.
    """
    no_collectives = {"no_dist": True} if in_one_process else {}
    titan_checkpoint.dcp = SimpleNamespace(
        save=functools.partial(save_with_checksums, dcp.save, **no_collectives),
        load=functools.partial(load_plain, **no_collectives),
        async_save=functools.partial(save_with_checksums, dcp.async_save),
    )


def save_with_checksums(
    save: Callable[..., Any],
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | None = None,
    storage_writer: StorageWriter | None = None,
    **options: Any,
) -> Any:
    """Calls `dcp.save` or `dcp.async_save`; a folder without a writer of its own gets checksums.

    Raises:
        OSError, UserError: on every rank, if any rank cannot write; the error names the file.
    """
    writer = storage_writer or ChecksumWriter(checkpoint_id)
    with _failure_of_a_rank(checkpoint_id):
        return save(state_dict, checkpoint_id=checkpoint_id, storage_writer=writer, **options)


@contextmanager
def _failure_of_a_rank(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Raises in place of DCP's exception, which has tracebacks as text, the error of the rank that failed, if it is one about a file or
    about an entry that the checkpoint lacks."""
    try:
        yield
        return
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        found = next((failure for failure in failures if isinstance(failure, UserError) or is_about_a_file(failure)), None)
        # torch 2.13.0 compares the names of entries while it plans.
        missing = next(
            (match[1] for failure in failures if (match := re.search("Missing key in checkpoint.*: (.*?)\\.?$", str(failure)))), None
        )
        if found is None and missing is not None:
            found = UserError(f"{checkpoint} has no entry {missing}")
        if found is None:
            raise
    raise found  # outside the handler, whose context repeats it for each rank


def load_plain(
    state_dict: dict[str, Any], *, checkpoint_id: str | None = None, storage_reader: StorageReader | None = None, **options: Any
) -> None:
    """Calls `dcp.load` on a checkpoint that need not be trusted: metadata and entries are read as plain data, and what has a checksum is
    compared with it.

    Raises:
        UserError: on every rank, if what any rank reads is damaged.
    """
    reader = storage_reader or CheckedReader(Path(checkpoint_id))
    if isinstance(reader, CheckedReader):
        reader.read_metadata()  # torch would wrap its errors
        if not reader.has_checksums:
            logger.info(f"{checkpoint_id} has no checksums: its data are not compared with what was written")
    with _failure_of_a_rank(checkpoint_id or reader.path):
        dcp.load(state_dict, storage_reader=reader, planner=PlainLoadPlanner(), **options)


def write_description_with_checkpoints(checkpointer: CheckpointManager, description: ModelDescription) -> None:
    """Makes the manager write `config.json` and the tokenizer's files into every checkpoint.

    They are on disk before DCP begins, so that `.metadata`, which DCP writes last, shows that they are complete, too.
    """
    save = checkpointer.dcp_save

    @functools.wraps(save)
    def dcp_save(state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 0:
            description.in_dtype(state_dict["tok_embeddings.weight"].dtype).write(Path(checkpoint_id))
        return save(state_dict, checkpoint_id, *args, **kwargs)

    checkpointer.dcp_save = dcp_save


def explain_failed_writes(checkpointer: CheckpointManager) -> None:
    """Makes the error of a checkpoint that cannot be written name the folder, the reason, and how the run goes on. What was written of
    the checkpoint is removed, which frees its room."""
    if not checkpointer.enable:
        return
    save, wait = checkpointer.dcp_save, checkpointer._async_wait
    writing = Path(checkpointer.folder)

    @functools.wraps(save)
    def dcp_save(state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal writing
        writing = Path(checkpoint_id)
        with _explained(writing):
            return save(state_dict, checkpoint_id, *args, **kwargs)

    @functools.wraps(wait)
    def async_wait() -> None:
        with _explained(writing), _failure_of_a_rank(writing):
            wait()

    checkpointer.dcp_save, checkpointer._async_wait = dcp_save, async_wait


@contextmanager
def _explained(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        if isinstance(error, UserError):
            problem = str(error)
        elif is_about_a_file(error):
            file = Path(os.fsdecode(error.filename))
            where = "" if file == checkpoint else f"{file.name}: "
            problem = f"{checkpoint} cannot be written: {where}{reason(error, checkpoint.parent)}"
        else:
            raise
        if dist.get_rank() == 0 and not _is_complete(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        steps = complete_steps(checkpoint.parent)
        goes_on = f"goes on from step-{max(steps)}" if steps else "begins anew: no step is complete"
        raise UserError(f"{problem}. The same command {goes_on}") from error


def keep_settings_when_loading(
    checkpointer: CheckpointManager, optimizers: OptimizersContainer, lr_schedulers: LRSchedulersContainer
) -> None:
    """Lets loading take from a checkpoint the optimizer's moments and the position in the learning-rate schedule, while learning rate,
    schedule, betas and weight decay stay as this run's settings have them. torch takes these from the checkpoint too."""
    load = checkpointer.load

    @functools.wraps(load)
    def load_and_keep(step: int = -1) -> bool:
        settings = [{key: value for key, value in group.items() if key != "params"} for group in _parameter_groups(optimizers)]
        learning_rates = [scheduler.base_lrs for scheduler in lr_schedulers]
        with _way_out_named(checkpointer):
            is_loaded = _load_own_or_start(checkpointer, load, step)
        for group, own in zip(_parameter_groups(optimizers), settings):
            group.update(own)
        for scheduler, base_lrs in zip(lr_schedulers, learning_rates):
            current = [base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(base_lrs, scheduler.lr_lambdas)]
            scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": base_lrs, "_last_lr": current})
            for group, learning_rate in zip(scheduler.optimizer.param_groups, current):
                group["lr"] = learning_rate
        return is_loaded

    checkpointer.load = load_and_keep


def _load_own_or_start(checkpointer: CheckpointManager, load: Callable[[int], bool], step: int) -> bool:
    """Loads the checkpoint of `step`, of the last step for -1; if the run has none that is complete, the weights from which it starts.

    torchtitan counts whatever has `step-N` in its name, and loads no start once the checkpoint folder exists, whatever is in it.
    """
    if not checkpointer.enable:
        return load(step)
    folder = checkpointer.folder
    if step == -1:
        step = max(complete_steps(Path(folder)), default=-1)
    if step >= 0:
        return load(step)
    checkpointer.folder = os.path.join(folder, "step--1")  # does not exist: no run has such a step
    try:
        return load(step)
    finally:
        checkpointer.folder = folder


def _parameter_groups(optimizers: OptimizersContainer) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def checkpoint_this_step(checkpointer: CheckpointManager) -> None:
    """Makes the manager write a checkpoint at every step from now on, like those of `checkpoint.interval`."""
    checkpointer.interval = 1


def is_checkpoint_due(checkpointer: CheckpointManager, step: int) -> bool:
    """Whether the manager writes a checkpoint after a step that need not be the last one."""
    return step > 0 and checkpointer._should_save(step)


def keep_latest_whole(checkpointer: CheckpointManager) -> None:
    """Makes the manager keep the latest `checkpoint.keep_latest_k` whole checkpoints, and remove none before it has so many.

    torchtitan counts whatever has `step-N` in its name: a checkpoint that is being written, one whose files are missing or short, and
    copies under other names, which it removes; and it removes none after the last step.
    """
    if not checkpointer.enable or checkpointer.keep_latest_k == 0:
        return
    save, known = checkpointer.save, {}

    def remove_old() -> None:
        if dist.get_rank() != 0:
            return
        folder = Path(checkpointer.folder)
        steps = sorted(complete_steps(folder), reverse=True)
        whole = [step for step in steps if _is_whole(folder / f"step-{step}", known)]
        if len(whole) < checkpointer.keep_latest_k:
            return
        for step in steps:
            if step < whole[checkpointer.keep_latest_k - 1]:
                path = folder / f"step-{step}"
                for file in (METADATA_FILE, INDEX_FILE):  # it looks incomplete, should the run end before all of it is gone
                    (path / file).unlink(missing_ok=True)
                known.pop(path, None)
                checkpointer.purge_queue.put(str(path))

    @functools.wraps(save)
    def save_and_remove(curr_step: int, last_step: bool = False) -> None:
        save(curr_step, last_step)
        if last_step:
            checkpointer._purge_stale_checkpoints()

    checkpointer._purge_stale_checkpoints = remove_old
    checkpointer.save = save_and_remove


def _is_whole(checkpoint: Path, known: dict[Path, tuple[tuple[int, int], Metadata]]) -> bool:
    """Whether a complete checkpoint has all its files in their size. Its data are not read. `known` keeps time,
    size and content of `.metadata` for the next call."""
    if not (checkpoint / METADATA_FILE).is_file():
        return True  # Hugging Face weights
    try:
        stat = (checkpoint / METADATA_FILE).stat()
        if known.get(checkpoint, (None, None))[0] != (stat.st_mtime_ns, stat.st_size):
            known[checkpoint] = (stat.st_mtime_ns, stat.st_size), CheckedReader(checkpoint).read_metadata()
        problems = data_file_problems(checkpoint, known[checkpoint][1])
    except (UserError, OSError) as error:
        problems = [str(error)]
    if problems:
        logger.warning(f"{checkpoint} is damaged and not counted by checkpoint.keep_latest_k: {problems[0]}")
    return not problems


def await_writing(checkpointer: CheckpointManager) -> None:
    """Waits until an asynchronous write is on disk."""
    if checkpointer.enable:
        checkpointer._async_wait()


def resume_step(checkpointer: CheckpointManager, load_step: int, num_streams: int) -> int | None:
    """The step from which loading will resume, or None for a fresh start.

    Raises:
        UserError: `load_step` names no complete checkpoint; later checkpoints exist, which training would overwrite while they still
            look complete, and with them the records of their steps; or the checkpoint cannot be resumed, because it holds weights only,
            is damaged, holds more than plain data, or has another number of data streams.
    """
    if not checkpointer.enable:
        return None
    folder = Path(checkpointer.folder)
    steps = sorted(complete_steps(folder))
    if load_step == -1:
        step = steps[-1] if steps else None
    elif load_step not in steps:
        raise UserError(f"checkpoint.load_step is {load_step}; {folder} has the steps {steps}")
    elif steps[-1] > load_step:
        raise UserError(
            f"checkpoint.load_step is {load_step}, but {folder} goes on to step {steps[-1]}; this run would overwrite later checkpoints "
            f"and remove the records of their steps. Start in another job.dump_folder with checkpoint.initial_load_path = "
            f"'{folder}/step-{load_step}', or move the later checkpoints away"
        )
    else:
        step = load_step
    if step is not None:
        with _way_out_named(checkpointer):
            names = _check_loadable(folder / f"step-{step}")
        if step > 0:  # from step 0, a seed checkpoint, the manager loads only the model
            _check_resumable(folder / f"step-{step}", names, num_streams, DATALOADER in checkpointer.exclude_from_loading)
    return step


@contextmanager
def _way_out_named(checkpointer: CheckpointManager) -> Iterator[None]:
    """Adds to the error about a damaged checkpoint of this run how the run can go on."""
    try:
        yield
    except DamagedCheckpoint as error:
        folder = error.folder.parent
        if folder != Path(checkpointer.folder):
            raise
        damaged = int(error.folder.name.removeprefix("step-"))
        earlier = [step for step in complete_steps(folder) if step < damaged]
        way_out = f"continue from step-{max(earlier)}" if earlier else "start anew: no checkpoint is older"
        raise UserError(f"{error}; remove that folder to {way_out}") from error


def _check_loadable(checkpoint: Path) -> Collection[str]:
    """Checks that a checkpoint's files are whole and hold plain data; returns the names of its entries, none for Hugging Face weights."""
    if not (checkpoint / METADATA_FILE).is_file():
        return ()
    reader = CheckedReader(checkpoint)
    metadata = reader.read_metadata()
    problems = data_file_problems(checkpoint, metadata)
    if problems:
        raise DamagedCheckpoint(checkpoint, problems[0])
    check_entries(reader)
    return metadata.state_dict_metadata


def _check_resumable(checkpoint: Path, names: Collection[str], num_streams: int, is_data_excluded: bool) -> None:
    if not any(name.startswith("optimizer.") for name in names):
        raise UserError(
            f"{checkpoint} holds weights only and cannot be resumed; start another job.dump_folder from it with "
            "checkpoint.initial_load_path, or remove it to continue from the one before"
        )
    streams = sum(name.startswith(f"{DATALOADER}.stream_") for name in names)
    if streams != num_streams and not is_data_excluded:
        raise UserError(
            f"{checkpoint} has the data position of {streams} stream(s), this run has {num_streams}; pass --data.num_streams "
            f"{streams} (which the data-parallel ranks must divide), or --checkpoint.exclude_from_loading {DATALOADER} to start "
            "from the beginning of the data"
        )


def remove_incomplete(folder: Path) -> None:
    """Removes incomplete checkpoints: those without `.metadata`, which DCP writes last, by renaming, after everything else is on disk.

    The next start needs their room.
    """
    if not folder.is_dir():
        return
    for path in _step_folders(folder):
        if not _is_complete(path):
            logger.warning(f"Removing {path}: its writing was interrupted")
            shutil.rmtree(path)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    return [int(path.name.removeprefix("step-")) for path in _step_folders(folder) if _is_complete(path)]


def newest_checkpoint(checkpointer: CheckpointManager) -> Path | None:
    """The run's complete checkpoint of the last step; None if there is none, or if the run writes none."""
    if not checkpointer.enable:
        return None
    folder = Path(checkpointer.folder)
    steps = complete_steps(folder)
    return folder / f"step-{max(steps)}" if steps else None


def _step_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and re.fullmatch("step-(0|[1-9][0-9]*)", path.name)]


def _is_complete(path: Path) -> bool:
    return (path / METADATA_FILE).is_file() or (path / INDEX_FILE).is_file()
