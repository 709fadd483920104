"""The errors that are the user's to mend."""


class UserError(ValueError):
    """A setting, file or checkpoint is wrong. The message names it, the value found and the values allowed.

    The command line prints it without a traceback.
    """


class ExtensionError(UserError):
    """An installed package that extends refine_titan is wrong. The message names the setting, the package and what is wrong.

    Where the package raised an error, that one is the cause, and the command line prints its traceback before the message.
    """
