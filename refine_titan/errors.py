"""The errors that a user can correct, as one line of text that a terminal can show."""

import re

# Control characters, which move the cursor, colour, ring or hide on a terminal; those that turn the direction of the text around or end
# a line for some programs; and halves of surrogate pairs, which cannot be written.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, kept: str = "") -> str:
    """Text in which characters that do more than stand on a line are escaped (`\\x1b`), but those of `kept`.

    Names of files, keys, tensors and tasks come from whoever made the files.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else found[0].encode("unicode_escape").decode(), str(text))


class UserError(ValueError):
    """A setting, file or checkpoint is wrong. The message names it, the value found and the values allowed.

    The command line prints it without a traceback.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(UserError):
    """The words of a command line are wrong: an option that does not exist, one without its value. The status is 2, of all others 1."""


class RunFailure(RuntimeError):
    """Something that a command depends on has failed: an engine, another rank, a worker. The message says all that helps a user.

    The command line prints it without a traceback, or after that of its cause.
    """


class ExtensionError(UserError):
    """An installed package that extends refine_titan is wrong. The message names the setting, the package and what is wrong.

    If the package raised an error, that error is its cause, and the command line prints its traceback before the message.
    """
