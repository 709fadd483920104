"""The error that is the user's to mend."""


class UserError(ValueError):
    """A setting, file or checkpoint is wrong. The message names it, the value found and the values allowed.

    The command line prints it without a traceback.
    """
