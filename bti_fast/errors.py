"""The two exceptions that callers of bti_fast are expected to catch by name."""


class UserError(ValueError):
    """Bad input from the user (a file, an option, a checkpoint): the message is one line that names it.

    The command line prints it without a traceback and exits with 2.
    """


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message gives the reason."""
