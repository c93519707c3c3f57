"""LLaVA conversations: a JSON list beside a folder of pictures.

    [{"id": "7", "image": "7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

`image` may be one path, a list of paths or missing; each `<image>` in the text stands for the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.data.sample import Sample
from mqwen.storage import Location, StorageError

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MARKER = "<image>"


@dataclass(frozen=True)
class LlavaSource:
    conversations: Location
    pictures: Location

    def chunks(self, size: int) -> list[list[dict[str, Any]]]:
        """The records in lists of `size`. Raises DataError where the file is no list of conversations."""
        try:
            records = json.loads(self.conversations.read_bytes())
        except StorageError as error:
            raise DataError(str(error)) from error
        except ValueError as error:
            raise DataError(f"{self.conversations} is not JSON: {error}") from error
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"{self.conversations} must hold a list of conversations, as LLaVA's files do")
        if not records:
            raise EmptyDatasetError(f"{self.conversations} holds no conversations")
        numbered = [{"id": str(n), **record} for n, record in enumerate(records)]
        return [numbered[i : i + size] for i in range(0, len(numbered), size)]

    def read(self, chunk: list[dict[str, Any]]) -> Iterator[tuple[str, Sample | DataError]]:
        """Each record's id with its sample, or with what is wrong with it."""
        for record in chunk:
            key = str(record["id"])
            try:
                yield key, self._sample(key, record)
            except (DataError, StorageError) as error:
                yield key, DataError(str(error))

    def _sample(self, key: str, record: dict[str, Any]) -> Sample:
        paths = record.get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        messages, markers = [], 0
        for turn in record.get("conversations", []):
            if turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
                raise DataError(
                    f"a turn has from={turn.get('from')!r}; allowed are {', '.join(_ROLES)} with a text value"
                )
            content = _parts(turn["value"])
            markers += sum(part["type"] == "image" for part in content)
            messages.append({"role": _ROLES[turn["from"]], "content": content})
        if markers != len(paths):
            raise DataError(f"{len(paths)} pictures are named, {markers} {_MARKER} markers stand in the text")
        return Sample(f"{key}".replace("/", "_").replace(".", "_"), messages, [self._picture(p) for p in paths], key)

    def _picture(self, path: str) -> bytes:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"picture path {path!r} leaves the pictures' folder")
        return (self.pictures / path).read_bytes()


def _parts(text: str) -> list[dict[str, str]]:
    """Text with markers as parts; the line breaks that LLaVA's files put around a marker are dropped."""
    parts: list[dict[str, str]] = []
    for n, piece in enumerate(text.split(_MARKER)):
        if n:
            parts.append({"type": "image"})
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts
