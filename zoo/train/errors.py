"""The two ways a training command can end badly, each reported as one line (zoo/train/cli.py)."""


class UserError(ValueError):
    """The user asked for something that cannot be done: exit status 2. The message is one line and names the remedy."""


class RunError(RuntimeError):
    """A run that started well had to stop (not-a-number, a full disk): exit status 1. The message is one line."""
