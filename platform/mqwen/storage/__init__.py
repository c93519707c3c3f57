"""One URI to one place, whatever it lies on: a folder, file:// or s3:// for data, checkpoints and artifacts alike."""

from mqwen.storage.check import readable, writable
from mqwen.storage.errors import MissingFileError, StorageError, TruncatedFileError
from mqwen.storage.local import filled, local_file, local_folder, workplace
from mqwen.storage.location import Location, locate
from mqwen.storage.retry import retried

__all__ = [
    "Location",
    "MissingFileError",
    "StorageError",
    "TruncatedFileError",
    "filled",
    "local_file",
    "local_folder",
    "locate",
    "readable",
    "retried",
    "workplace",
    "writable",
]
