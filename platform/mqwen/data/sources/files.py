"""Files that sources share: lists of records, and pictures beside them."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.storage import Location, MissingFileError

Record = dict[str, Any]


def read_records(file: Location, what: str) -> list[Record]:
    """A JSON file's list of objects. Raises DataError where it is none; `what` says of what the list should be."""
    try:
        data = file.read_bytes()
        # Bytes that are no text spoil the record that they stand in, not the file: see conversation.check_text.
        records = json.loads(data.decode(json.detect_encoding(data), "surrogateescape"))
    except MissingFileError as error:
        raise DataError(f"{error}; it should be a JSON file of {what}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{file} must hold a list of {what}")
    if not records:
        raise EmptyDatasetError(f"{file} holds no {what}")
    return records


def check_folder(pictures: Location) -> None:
    if not pictures.exists():
        raise DataError(f"the pictures' folder {pictures} does not exist")


def read_picture(folder: Location, path: Any) -> bytes:
    """Raises SampleError for a path that leads out of the folder, or to nothing."""
    if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise SampleError("picture path", f"{path!r:.200} is no path inside {folder}")
    try:
        return (folder / path).read_bytes()
    except MissingFileError as error:
        raise SampleError("missing picture", str(error)) from error


def in_chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
