"""What reaches the terminal of texts that hold names from files: log records and lines of results, with control characters escaped."""

import logging
import re
import sys
from typing import TextIO

from refine_titan.errors import printable

# A colour, which torchtitan's own messages hold.
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


class EscapedRecord(logging.LogRecord):
    """A log record whose message is one line, or, of another package, lines. torchtitan's keep their colours."""

    def getMessage(self) -> str:
        message = super().getMessage()
        if "/refine_titan/" in self.pathname:
            return printable(message, kept="\t")
        parts = _COLOUR.split(message) if "/torchtitan/" in self.pathname else [message]
        return "".join(part if _COLOUR.fullmatch(part) else printable(part, kept="\t\n") for part in parts)


def escape_log_records() -> None:
    """Makes every log record of this process an `EscapedRecord`."""
    logging.setLogRecordFactory(EscapedRecord)


def show(text: object, file: TextIO | None = None) -> None:
    """Prints lines that hold names from files."""
    print(printable(text, kept="\t\n"), file=file or sys.stdout, flush=True)
