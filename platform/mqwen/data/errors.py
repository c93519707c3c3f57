"""What can be wrong with data, each as an error of its own."""

from mqwen.errors import LastingError, UserError


class DataError(UserError):
    """The data cannot be used; the message names what was given, what is allowed and the way out."""


class EmptyDatasetError(DataError):
    """Nothing to read was left."""


class TooManyBadError(DataError, LastingError):
    """More samples than `data.max_bad` allows could not be used; the message lists them."""


class SampleError(DataError):
    """One sample cannot be used. `reason` is one of a few words, to be counted by; `detail` says it of this sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
