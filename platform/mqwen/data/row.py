"""A row: the packs that one forward pass takes, built from stored samples as one row of an Arrow table.

Shapes: P packs a row, T tokens of the longest of them (a picture is one placeholder token), I pictures of 3 x H x W.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mqwen.data.errors import DataError
from mqwen.data.order import OrderSettings, Position
from mqwen.data.sample import Sample
from mqwen.model import MQWenProcessor
from mqwen.model.chat import IGNORED, encode_chat

COLUMNS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),  # P x T, as are the next two
        ("labels", pa.list_(pa.int32())),
        ("segment_ids", pa.list_(pa.int32())),
        ("pixels", pa.large_binary()),  # I x 3 x H x W bytes
        ("images", pa.int32()),
        ("supervised", pa.int32()),
        ("positions", pa.int32()),
        ("place", pa.list_(pa.int64(), 3)),
        ("start", pa.list_(pa.int64(), 3)),
        ("keys", pa.list_(pa.string())),
        ("quarantined", pa.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """One sample's place in a pack: its index row, and the sample or what is wrong with it."""

    index: dict[str, Any]
    sample: Sample | DataError


class RowBuilder:
    """Renders, tokenizes, decodes and packs; runs in the reading tasks."""

    def __init__(self, processor: MQWenProcessor, settings: OrderSettings) -> None:
        self._processor, self._settings = processor, settings

    def build(self, packs: Sequence[Sequence[Entry]], place: Position, start: Position) -> pa.Table:
        """The row as a table of one, with the columns of COLUMNS."""
        keys: list[str] = []
        quarantined: dict[str, str] = {}
        pictures: list[np.ndarray] = []
        # A short row is filled with empty packs: every row of a run has the same number of them.
        ids: list[list[int]] = [[] for _ in range(self._settings.packs_per_row)]
        labels, segments = [[list[int]() for _ in ids] for _ in range(2)]
        positions = 0
        for p, pack in enumerate(packs):
            for segment, entry in enumerate(pack, start=1):
                try:
                    chat, shown = self._encode(entry)
                    keys.append(entry.index["key"])
                except (DataError, ValueError) as error:
                    quarantined[entry.index["key"]] = str(error)
                    chat, shown = ([self._processor.tokenizer.eod_id], [IGNORED]), []
                ids[p] += chat[0]
                labels[p] += chat[1]
                segments[p] += [segment] * len(chat[0])
                pictures += shown
                positions += len(chat[0]) + len(shown) * (self._settings.image_positions - 1)
        width = max(1, *map(len, ids))
        filled = {
            name: np.array([part + [fill] * (width - len(part)) for part in parts], np.int32)
            for name, parts, fill in (
                ("input_ids", ids, self._processor.tokenizer.eod_id),
                ("labels", labels, IGNORED),
                ("segment_ids", segments, 0),
            )
        }
        columns = {name: array.ravel() for name, array in filled.items()} | {
            "pixels": b"".join(picture.tobytes() for picture in pictures),
            "images": len(pictures),
            "supervised": int((filled["labels"] != IGNORED).sum()),
            "positions": positions,
            "place": [place.epoch, place.window, place.row],
            "start": [start.epoch, start.window, start.row],
            "keys": keys,
            "quarantined": json.dumps(quarantined, ensure_ascii=False),
        }
        return pa.table({name: [value] for name, value in columns.items()}, schema=COLUMNS)

    def _encode(self, entry: Entry) -> tuple[tuple[list[int], list[int]], list[np.ndarray]]:
        """A sample's ids and labels, and its pictures; raises what is wrong with it."""
        sample, index = entry.sample, entry.index
        if isinstance(sample, DataError):
            raise sample
        chat = encode_chat(self._processor.tokenizer, sample.messages)
        counted, found = (index["tokens"], index["images"]), (len(chat.input_ids), len(sample.pictures))
        if counted != found:
            raise DataError(f"the index counts {counted} tokens and pictures, the shard holds {found}")
        pictures = [self._processor.pixels(picture, fast=True) for picture in sample.pictures]
        return (chat.input_ids, chat.labels), pictures
