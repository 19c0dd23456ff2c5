"""The one exception of zoo.data."""


class DataError(ValueError):
    """A user's mistake in the data, or a disk that cannot take the token cache; str() is one line that names the remedy."""
