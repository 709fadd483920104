"""TensorBoard's files: one folder a run, also over several starts, in which every step stands once.

torchtitan's logger (0.2.2) writes them in a thread, which on a full disk prints a traceback and ends the run.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torchtitan.components.metrics import BaseLogger
from torchtitan.tools.logging import logger

from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.reasons import naming
from refine_titan.files.whole_files import parts_of, write_atomically

FILE_VERSION = "brain.Event:2"


class TensorBoardLogger(BaseLogger):
    """Writes an event file beside those of earlier starts. What cannot be written waits."""

    def __init__(self, folder: Path, last_step: int):
        """Opens a file to go on after `last_step`, -1 for a run that starts. Numbers of later steps come from a run that ended before its
        next checkpoint; they are dropped.

        Raises:
            OSError: a file cannot be read or written.
        """
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("events.out.tfevents.*")):
                drop_later_steps(path, last_step)
        self._file = AppendedFile(folder / f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.0")
        # A TensorBoard that is open drops at a start what it has read of the steps from there on.
        start = Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._append(Event(wall_time=time.time(), file_version=FILE_VERSION), start)
        logger.info(f"TensorBoard: {folder}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes the numbers of a step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _append(self, *events: Event) -> None:
        piece = BytesIO()
        for event in events:
            RecordWriter(piece).write(event.SerializeToString())
        self._file.append(piece.getvalue())


def drop_later_steps(path: Path, last_step: int) -> None:
    """Takes the numbers of steps after `last_step` out of an event file, and what is not whole at its end. A file without numbers goes.

    Raises:
        OSError: the file cannot be read or written.
    """
    kept, has_numbers = [(0, 0)], False
    for begin, end, event in _events(path):
        is_number = event.HasField("summary")
        if is_number and event.step > last_step:
            continue
        has_numbers |= is_number
        if begin == kept[-1][1]:
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((begin, end))
    if not has_numbers:
        path.unlink()
    elif kept != [(0, path.stat().st_size)]:
        write_atomically(path, parts_of(path, kept))


def _events(path: Path) -> Iterator[tuple[int, int, Event]]:
    """Yields the records of an event file, each with its place, up to one that is not whole.

    A record is the length of its content, 8 bytes; a checksum of 4; the content; and another checksum.
    """
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            begin, (length,) = end, struct.unpack("<Q", head[:8])
            end = begin + 16 + length
            if end > size:
                return
            try:
                event = Event.FromString(file.read(length))
            except DecodeError:
                return
            file.seek(4, os.SEEK_CUR)
            yield begin, end, event
