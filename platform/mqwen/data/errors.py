"""What can be wrong with data, each as an error of its own."""


class DataError(Exception):
    """The data cannot be used; the message names what was given, what is allowed and the way out."""


class EmptyDatasetError(DataError):
    """Nothing to read was left."""
