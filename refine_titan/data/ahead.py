"""Batches that a worker process reads, tokenizes and packs ahead of the step.

The worker has the rank's `PackedDataLoader`, and with each batch it sends the positions after it. The trainer's process keeps the
positions of the last batch that it has taken, so that a checkpoint knows nothing of batches made in advance, and is the same as without
a worker. It is a process and not a thread, since tokenizing holds Python's lock.

torch's DataLoader is not used: it raises the death of a worker from a signal handler, wherever the trainer then is; its worker dies of a
SIGTERM to the whole job, which here asks for one more checkpoint; and it starts only with the first batch, not while the model is built.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import PackedDataLoader, TokenBatch, build_dataloader
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.errors import UserError
from refine_titan.worker_process import WorkerDied, WorkerProcess

# Longest wait for a batch. Reading may have to pass over millions of documents that are too short before it finds one.
BATCH_SECONDS = 1800.0


def build_training_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, **_
) -> "PackedDataLoader | AheadDataLoader":
    """Builds this rank's dataloader for `[data]`, with a worker process if `data.batches_ahead` says so; torchtitan calls it.

    Raises:
        UserError: the source cannot be read. With a worker, the dataloader's first use raises it.
    """
    batches = batches_ahead(job_config)
    if batches == 0:
        return build_dataloader(dp_world_size, dp_rank, tokenizer, job_config)
    training = job_config.training
    microbatches = max(1, training.global_batch_size // (training.local_batch_size * dp_world_size))
    # A run that does not resume begins at the beginning of the data: its first batches can be made while the model is built.
    may_resume = job_config.checkpoint.enable and Path(job_config.job.dump_folder, job_config.checkpoint.folder).exists()
    return AheadDataLoader(dp_world_size, dp_rank, job_config, batches * microbatches, begin_at_once=not may_resume)


def batches_ahead(config: JobConfig) -> int:
    """`data.batches_ahead` with -1 resolved for this machine."""
    if config.data.batches_ahead == -1:
        return 2 if torch.cuda.is_available() else 0
    return config.data.batches_ahead


class AheadDataLoader(BaseDataLoader):
    """Yields what the `PackedDataLoader` of this rank yields, from a worker process that makes `ahead` microbatches in advance."""

    def __init__(self, dp_world_size: int, dp_rank: int, job_config: JobConfig, ahead: int, begin_at_once: bool = False):
        """Starts the worker; the first use waits for it.

        Args:
            begin_at_once: whether it makes the first batches before one is asked for; they are dropped if a position is loaded.
        """
        self.num_streams = job_config.data.num_streams or dp_world_size
        self._ahead = ahead
        self._worker = WorkerProcess()
        self._send(begin, dp_world_size, dp_rank, job_config)
        self._has_begun = False
        # Microbatches that were asked for and not taken.
        self._asked = 0
        if begin_at_once:
            self._ask()

    def source_description(self) -> list[str]:
        """Lines that say what `data.source` reads, and what it leaves out and why."""
        self._await_begin()
        return self._description

    def __iter__(self) -> Iterator[tuple[dict[str, TokenBatch], torch.Tensor]]:
        while True:
            batch = self.next_batch()
            yield {"batch": batch}, batch.labels_T

    def next_batch(self) -> TokenBatch:
        self._await_begin()
        self._ask()
        batch, positions = self._value(*self._take_microbatch())
        self._positions |= positions
        return replace(batch, tokens_T=torch.from_numpy(batch.tokens_T), labels_T=torch.from_numpy(batch.labels_T))

    def state_dict(self) -> dict[str, Any]:
        self._await_begin()
        return dict(self._positions)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._await_begin()
        while self._asked:  # made from another position
            self._take_microbatch()
        self._send(restore_position, state_dict)
        self._positions = self._value(*self._receive(restore_position))

    def close(self) -> None:
        """Ends the worker."""
        self._worker.end()

    def _await_begin(self) -> None:
        if not self._has_begun:
            self._positions, self._description = self._value(*self._receive(begin))
            self._has_begun = True

    def _ask(self) -> None:
        while self._asked <= self._ahead:
            self._send(make_batch)
            self._asked += 1

    def _take_microbatch(self) -> tuple[Any, list[tuple[int, str]]]:
        answer = self._receive(make_batch)
        self._asked -= 1
        return answer

    def _send(self, function: Callable, *arguments: Any) -> None:
        try:
            self._worker.send(function, *arguments)
        except WorkerDied as error:
            raise _explain(error) from None

    def _receive(self, function: Callable) -> tuple[Any, list[tuple[int, str]]]:
        """The worker's next answer.

        Raises:
            UserError: the worker has died, or has not answered in time.
        """
        try:
            if self._worker.connection.poll(BATCH_SECONDS):
                return self._worker.receive(function)
        except WorkerDied as error:
            raise _explain(error) from None
        raise UserError(
            f"the data worker (process {self._worker.pid}) has not answered for {BATCH_SECONDS:.0f} seconds; see whether data.source "
            "can be read, or pass --data.batches_ahead 0 to read in the trainer's process, which waits without a limit"
        )

    def _value(self, value: Any, messages: list[tuple[int, str]]) -> Any:
        """The value of an answer; logs what the worker has logged.

        Raises:
            UserError: the worker's, if the data cannot be read.
        """
        for level, message in messages:
            logging.getLogger().log(level, message)
        if isinstance(value, UserError):
            raise value
        return value


def _explain(error: WorkerDied) -> UserError:
    return UserError(
        f"the data worker is gone: {error}. The same command goes on from the last checkpoint; with --data.batches_ahead 0 the "
        "trainer's process reads the data"
    )


class _Worker:
    """What the worker process holds."""

    loader: PackedDataLoader
    messages: list[tuple[int, str]] = []


class _Collector(logging.Handler):
    """Keeps what is logged until the next answer."""

    def emit(self, record: logging.LogRecord) -> None:
        _Worker.messages.append((record.levelno, record.getMessage()))


def _answer(make: Callable[[], Any]) -> tuple[Any, list[tuple[int, str]]]:
    """What `make` returns, or the UserError that it raises; and what was logged since the last answer."""
    try:
        value = make()
    except UserError as error:
        value = UserError(str(error))
    messages, _Worker.messages = _Worker.messages, []
    return value, messages


def begin(dp_world_size: int, dp_rank: int, job_config: JobConfig) -> tuple[Any, list[tuple[int, str]]]:
    """Builds the worker's loader; its position, and its description of the source."""

    def build() -> tuple[dict[str, Any], list[str]]:
        _Worker.loader = build_dataloader(dp_world_size, dp_rank, build_tokenizer(job_config), job_config)
        return _Worker.loader.state_dict(), _Worker.loader.source_description()

    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().handlers = [_Collector()]
    return _answer(build)


def make_batch() -> tuple[Any, list[tuple[int, str]]]:
    """Makes the next microbatch of the worker's loader; and the positions that it has changed."""

    def make() -> tuple[TokenBatch, dict[str, str]]:
        batch = _Worker.loader.next_batch()
        # As arrays, whose bytes go through the pipe; torch would send tensors as handles of shared memory.
        arrays = replace(batch, tokens_T=batch.tokens_T.numpy(), labels_T=batch.labels_T.numpy())
        return arrays, _Worker.loader.positions_of_last_batch()

    return _answer(make)


def restore_position(state_dict: dict[str, Any]) -> tuple[Any, list[tuple[int, str]]]:
    """Moves the worker's loader to a position, and returns it."""

    def restore() -> dict[str, Any]:
        _Worker.loader.load_state_dict(state_dict)
        return _Worker.loader.state_dict()

    return _answer(restore)
