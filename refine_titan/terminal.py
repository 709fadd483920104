"""What a program writes on the terminal: log lines of one form, whoever writes them, results, and how Ctrl-C and
other signals end it.

Texts that hold names from files have their control characters escaped.
"""

import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from refine_titan.errors import printable

INTERRUPTED = 130
# Most columns of a line that a run writes again and again.
MOST_COLUMNS = 100

# A colour, which torchtitan's own messages hold.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_COLOUR_OF_LEVEL = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}
_NO_COLOUR = "\x1b[0m"

# Messages of torchtitan 0.2.2 that are left out or said in other words. They say nothing that a user could act on, or what a line of ours
# says; some read as if something were wrong: the peak of an unknown GPU, from which no figure of a run is computed.
_OTHER_WORDS: list[tuple[re.Pattern[str], str | None]] = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Error running lspci|Peak flops undefined for|Peak FLOPS used for computing MFU", None),
        (r"\[GC\] |Building \S+ .*with \{|Sleeping 2 seconds for other ranks|Training completed|Destroying the purge thread", None),
        (r"Saving the checkpoint \(or staging|Saving a full checkpoint at last step", None),
        (r"Synchronizing and adjusting timeout|Mixed precision training is handled by ", None),
        (r"ENV\[TORCH_NCCL_ASYNC_ERROR_HANDLING\] = 1 will be overridden", None),
        (r"Building device mesh with parallelism|Successfully created meshes|Starting job: default job$", None),
        (r"Finished saving the checkpoint \(or staging if async is enabled\) ?in ([\d.]+) seconds\.", r"Checkpoint written in \1 s"),
        (r"Finished loading the checkpoint in ([\d.]+) seconds\.", r"Checkpoint read in \1 s"),
        (r"Checkpointing active\. Checkpoints will be loaded from and saved to (.*)", r"Checkpoints: \1"),
        (
            r"Trainer is initialized with local batch size (\d+), global batch size (\d+), gradient accumulation steps (\d+), "
            r"sequence length (\d+), total steps (\d+) \(warmup (\d+)\)",
            r"Batch: \2 sequence(s) of \4 tokens, in \3 microbatch(es) of \1; \5 steps, warm-up \6",
        ),
        (r"(\w+ memory usage for model: [\d.]+)GiB\(([\d.]+)%\)", r"\1 GiB (\2 %)"),
        (r"(\w+ capacity: .* with [\d.]+)GiB memory", r"\1 GiB"),
    )
]

# Warnings of torch 2.13.0 about what torchtitan and FSDP2 do by design, for each rank and module; no module's output is changed in place.
_USELESS_WARNINGS = (
    r"DTensor random operators may not have complete support",
    r"DTensor manual_seed\(\) may not have complete support",
    r"FSDP2-wrapped module .* returned a view tensor",
    r"Set timeout is now only supported for either nccl or gloo",
)


class EscapedRecord(logging.LogRecord):
    """A log record whose message is one line, or, of another package, lines. torchtitan's come without their colours."""

    def getMessage(self) -> str:
        message = super().getMessage()
        if "/refine_titan/" in self.pathname:
            return printable(message, kept="\t")
        return printable(_COLOUR.sub("", message) if "/torchtitan/" in self.pathname else message, kept="\t\n")


def escape_log_records() -> None:
    """Makes every log record of this process an `EscapedRecord`."""
    logging.setLogRecordFactory(EscapedRecord)


class LogLine(logging.Formatter):
    """`[11-29 19:30:11] message`, with the level before the message unless it is INFO, in colour on a terminal."""

    def __init__(self, colour: bool):
        super().__init__("[%(asctime)s] %(level)s%(message)s", "%m-%d %H:%M:%S")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        name = record.levelname
        begin, end = (_COLOUR_OF_LEVEL.get(name, ""), _NO_COLOUR) if self.colour and name in _COLOUR_OF_LEVEL else ("", "")
        record.level = "" if name == "INFO" else f"{begin}{name}{end} "
        return super().format(record)


class LogLines(logging.StreamHandler):
    """Writes log lines to what standard output is at that time: a progress bar takes its place while it is shown."""

    def __init__(self, colour: bool):
        super().__init__(sys.stdout)
        self.setFormatter(LogLine(colour))
        self.addFilter(_in_our_words)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _in_our_words(record: logging.LogRecord) -> bool:
    """Whether a record is worth a line; puts some of torchtitan's in other words."""
    if "/torchtitan/" not in record.pathname:
        return True
    message = record.getMessage()
    for pattern, words in _OTHER_WORDS:
        if pattern.match(message):
            if words is None:
                return False
            record.msg, record.args = pattern.sub(words, message), None
    return True


def begin_log(colour: bool = True) -> None:
    """Makes this program write its log, that of every library and Python's warnings to standard output, in one form.

    Warnings that address programmers (of names that a library will drop, and `_USELESS_WARNINGS`) are left out, unless Python has been
    asked for them (`-W`, `PYTHONWARNINGS`).

    Args:
        colour: whether levels have colours where standard output is a terminal. `NO_COLOR` in the environment wins.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers[:] = [LogLines(colour and has_colour(sys.stdout))]
    os.environ["KINETO_LOG_LEVEL"] = "5"  # torch's profiler writes past the log
    if not os.environ.get("TORCH_LOGS"):
        take_over_logger("torch")
    warnings.showwarning = _log_warning
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for message in _USELESS_WARNINGS:
            warnings.filterwarnings("ignore", message)


def has_colour(stream: TextIO) -> bool:
    """Whether colours may be written: to a terminal that has them, unless `NO_COLOR` is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    logging.getLogger("py.warnings").warning(f"{category.__name__}: {message} ({filename}:{lineno})")


def take_over_logger(name: str) -> None:
    """Makes the loggers of a library that writes by itself leave this to the log of the program."""
    own = [other for other in logging.Logger.manager.loggerDict if other.startswith(f"{name}.")]
    for found in (name, *own):
        logger = logging.getLogger(found)
        if not found.endswith("__trace"):  # torch's record for its own tools: every detail, and never for people
            logger.handlers.clear()
            logger.propagate = True


@contextmanager
def without_warnings_of(*names: str) -> Iterator[None]:
    """Keeps loggers from warning while a library is imported that makes them; their errors stay."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def leave_out_logger(name: str) -> None:
    """Keeps the loggers of a library from writing."""
    for found in (name, *(other for other in logging.Logger.manager.loggerDict if other.startswith(f"{name}."))):
        logging.getLogger(found).setLevel(logging.CRITICAL)


def share_columns() -> None:
    """Tells the ranks that this launcher starts how many columns they have beside the prefix of their lines (`COLUMNS`): their own
    output is a pipe."""
    prefix = os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "").replace("${rank}", "0")
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else MOST_COLUMNS
    os.environ["COLUMNS"] = str(min(terminal, MOST_COLUMNS) - len(prefix))


def columns() -> int:
    """Columns that a line of results may have: those of the terminal, or as many as a launcher says, and at most `MOST_COLUMNS`."""
    if sys.stdout.isatty():
        return min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    given = os.environ.get("COLUMNS", "")
    return min(int(given), MOST_COLUMNS) if given.isdecimal() else MOST_COLUMNS


def lines_of_parts(parts: Sequence[str], width: int) -> list[str]:
    """Puts parts side by side, two spaces apart, into lines of at most `width` columns; further lines are indented. A part stays whole."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return lines


def folded(text: str) -> str:
    """Lines that fit the terminal: what is too long goes on below, indented as the text after `label:` is. Elsewhere they stay whole."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    indent = re.match(r"(\w+: +)?(  )*", line).end()
    if len(line) <= width or indent >= width // 2:
        return line
    first, rest = line[:indent], line[indent:]
    parts = textwrap.wrap(rest, width - indent, break_long_words=False, break_on_hyphens=False)
    return first + f"\n{' ' * indent}".join(parts)


def show(text: object, file: TextIO | None = None) -> None:
    """Prints lines that hold names from files."""
    print(printable(text, kept="\t\n"), file=file or sys.stdout, flush=True)


def end_when_interrupted() -> None:
    """Makes Ctrl-C end this process at once, with one line: for the seconds in which a program imports its libraries.

    Changes nothing where SIGINT is ignored, as in a job in the background, or handled already.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_when_interrupted() -> None:
    """Takes `end_when_interrupted` back: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_on(*numbers: int, by: type[BaseException] = KeyboardInterrupt) -> None:
    """Makes the first of these signals raise an exception in this process. Further ones change nothing: whoever cleans up then is not
    interrupted again."""

    def raise_once(*_) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise by

    for number in numbers:
        signal.signal(number, raise_once)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)
