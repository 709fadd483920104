"""TensorBoard's files. torchtitan's logger (0.2.2) writes them in a thread, which on a full disk prints a traceback and ends the run."""

import os
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torchtitan.components.metrics as titan_metrics
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torchtitan.components.metrics import BaseLogger
from torchtitan.tools.logging import logger

from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.reasons import naming

FILE_VERSION = "brain.Event:2"


class TensorBoardLogger(BaseLogger):
    """Writes an event file, in place of torchtitan's class of this name. What cannot be written waits."""

    def __init__(self, log_dir: str, tag: str | None = None):
        """
        Raises:
            OSError: the file cannot be opened.
        """
        with naming(log_dir):
            Path(log_dir).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.0"
        self._tag = tag
        self._file = AppendedFile(Path(log_dir, name))
        self._append(Event(wall_time=time.time(), file_version=FILE_VERSION))
        logger.info(f"TensorBoard logging enabled. Logs will be saved at {log_dir}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes the numbers of a step."""
        names = {name: name if self._tag is None else f"{self._tag}/{name}" for name in metrics}
        values = [Summary.Value(tag=names[name], simple_value=value) for name, value in metrics.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        piece = BytesIO()
        RecordWriter(piece).write(event.SerializeToString())
        self._file.append(piece.getvalue())


def use_own_tensorboard_logger() -> None:
    """Makes torchtitan build the logger of this file."""
    titan_metrics.TensorBoardLogger = TensorBoardLogger
