"""What can be wrong with storage."""

from mqwen.errors import UserError


class StorageError(UserError):
    """Storage refused or failed; the message names the place and what the filesystem says."""


class MissingFileError(StorageError):
    """No file has this name. That stays so, where other storage errors may pass."""


class TruncatedFileError(StorageError):
    """A file ends before the bytes that were asked for; `data` holds those that are there."""

    def __init__(self, message: str, data: bytes = b"") -> None:
        super().__init__(message)
        self.data = data
