"""The errors a user can do something about; the command line prints them without a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: the text names the thing, its value and the next step.

    The command line prints the text alone and leaves with exit code 2.
    """


class StrictRefusal(RuntimeError):
    """Raised at start in strict mode when a patch that this vLLM needs cannot be applied."""
