"""The errors that a user can correct."""


class UserError(ValueError):
    """A setting, file or checkpoint is wrong. The message names it, the value found and the values allowed.

    The command line prints it without a traceback.
    """


class ExtensionError(UserError):
    """An installed package that extends refine_titan is wrong. The message names the setting, the package and what is wrong.

    If the package raised an error, that error is its cause, and the command line prints its traceback before the message.
    """
