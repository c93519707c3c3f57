"""LLaVA conversations: a JSON list beside a folder of pictures.

    [{"id": "7", "image": "7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

`image` may be one path, a list of paths or missing; each `<image>` in the text stands for the next one. Ids need not
be unique: LLaVA's own files ask several conversations about one picture under one id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.data.sample import Sample
from mqwen.storage import Location, MissingFileError

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MARKER = "<image>"
_LONGEST_KEY = 64  # a tar member's name takes 100 bytes, in UTF-8

Record = dict[str, Any]


@dataclass(frozen=True)
class LlavaSource:
    conversations: Location
    pictures: Location

    def chunks(self, size: int) -> list[list[tuple[str, Record | SampleError]]]:
        """The records, each with its key, in lists of `size`.

        Raises DataError where the file is no list of conversations, or the pictures' folder is not there.
        """
        try:
            records = json.loads(self.conversations.read_bytes())
        except MissingFileError as error:
            raise DataError(f"{error}; it should be a JSON file of LLaVA conversations") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.conversations} is not JSON: {error}") from error
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"{self.conversations} must hold a list of conversations, as LLaVA's files do")
        if not records:
            raise EmptyDatasetError(f"{self.conversations} holds no conversations")
        if not self.pictures.exists():
            raise DataError(f"the pictures' folder {self.pictures} does not exist")
        keyed = list(_with_keys(records))
        return [keyed[i : i + size] for i in range(0, len(keyed), size)]

    def read(self, chunk: list[tuple[str, Record | SampleError]]) -> Iterator[tuple[str, Sample | SampleError]]:
        """Each record's key with its sample, or with what is wrong with it."""
        for key, record in chunk:
            try:
                yield key, record if isinstance(record, SampleError) else self._sample(key, record)
            except SampleError as error:
                yield key, error

    def _sample(self, key: str, record: Record) -> Sample:
        paths = record.get("image") or []
        paths = paths if isinstance(paths, list) else [paths]
        turns = record.get("conversations")
        if not isinstance(turns, list):
            raise SampleError("conversation", f"'conversations' is {type(turns).__name__}; a list of turns is allowed")
        return Sample(key, [_message(turn) for turn in turns], [self._picture(path) for path in paths], _id(record))

    def _picture(self, path: Any) -> bytes:
        if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise SampleError("picture path", f"{path!r:.200} is no path inside {self.pictures}")
        try:
            return (self.pictures / path).read_bytes()
        except MissingFileError as error:
            raise SampleError("missing picture", str(error)) from error


def _with_keys(records: list[Record]) -> Iterator[tuple[str, Record | SampleError]]:
    """Each record with a key of its own, made of its id or else its number; of equal records the first alone counts."""
    same_id: dict[str, list[Record]] = {}
    taken: set[str] = set()
    for number, record in enumerate(records):
        name = re.sub(r"[^\w-]", "_", _id(record), flags=re.ASCII)[:_LONGEST_KEY] or str(number)
        same = same_id.setdefault(name, [])
        key = name if not same else f"{name}-{len(same) + 1}"
        while key in taken:
            key += "-"
        taken.add(key)
        yield key, SampleError("duplicate", "an equal record stands before it") if record in same else record
        same.append(record)


def _id(record: Record) -> str:
    return str(record.get("id", ""))


def _message(turn: Any) -> dict[str, Any]:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise SampleError(
            "conversation", f"a turn is {turn!r:.200}; allowed is 'from' {', '.join(_ROLES)} with a text as 'value'"
        )
    return {"role": _ROLES[role], "content": _parts(text)}


def _parts(text: str) -> list[dict[str, str]]:
    """Text with markers as parts; the line breaks that LLaVA's files put around a marker are dropped."""
    parts: list[dict[str, str]] = []
    for n, piece in enumerate(text.split(_MARKER)):
        if n:
            parts.append({"type": "image"})
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts
