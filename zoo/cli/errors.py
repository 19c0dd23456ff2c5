"""The one exception of zoo.cli."""


class CommandError(ValueError):
    """The user asked for something that cannot be done; str() is one line that names the remedy."""
