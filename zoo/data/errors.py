"""The one exception of zoo.data."""


class DataError(ValueError):
    """A mistake in the data, or a disk that cannot take the token cache; str() is one line with the remedy."""
