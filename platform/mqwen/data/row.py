"""A row: the packs that one forward pass takes, built from stored samples as one row of an Arrow table.

Shapes: P packs a row, T tokens of the longest of them (a picture is one placeholder token), I pictures of 3 x H x W.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mqwen.data.encode import encode
from mqwen.data.errors import SampleError
from mqwen.data.order import OrderSettings, Place, Position
from mqwen.data.sample import Sample
from mqwen.errors import UserError
from mqwen.model import MQWenProcessor
from mqwen.model.chat import IGNORED, EncodedChat

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
        ("epochs", pa.float64()),  # that lie before the next row
        ("keys", pa.list_(pa.string())),
        ("quarantined", pa.string()),
        ("failed", pa.string()),  # why reading ended here; all else is null then
    ]
)


def failed_row(error: UserError) -> pa.Table:
    """What comes in the place of a row that cannot be read. What a task raises would reach a rank as Ray's error, with
    a trace for text."""
    return pa.Table.from_pylist([{"failed": str(error)}], schema=COLUMNS)


@dataclass(frozen=True)
class Entry:
    """A sample of a pack, or what is wrong with it."""

    place: Place
    sample: Sample | SampleError


class RowBuilder:
    """Renders, tokenizes, decodes and packs; runs in the reading tasks."""

    def __init__(self, processor: MQWenProcessor, settings: OrderSettings) -> None:
        self._processor, self._settings = processor, settings

    def build(
        self,
        packs: Sequence[Sequence[Entry]],
        too_long: Sequence[Place],
        place: Position,
        start: Position,
        epochs: float = 0.0,
    ) -> pa.Table:
        """The row as a table of one, with the columns of COLUMNS.

        `too_long` are samples that no pack takes; they are quarantined with this row. `epochs` lie before the next one.
        """
        keys: list[str] = []
        quarantined = {sample.key: str(too_long_error(sample, self._settings)) for sample in too_long}
        pictures: list[np.ndarray] = []
        # A short row is filled with empty packs: every row of a run has the same number of them.
        ids: list[list[int]] = [[] for _ in range(self._settings.packs_per_row)]
        labels, segments = [[list[int]() for _ in ids] for _ in range(2)]
        positions = 0
        for p, pack in enumerate(packs):
            for segment, entry in enumerate(pack, start=1):
                try:
                    chat, shown = encode(self._processor, entry.sample)
                    keys.append(entry.place.key)
                except SampleError as error:
                    quarantined[entry.place.key] = str(error)
                    chat, shown = EncodedChat([self._processor.tokenizer.eod_id], [IGNORED]), []
                ids[p] += chat.input_ids
                labels[p] += chat.labels
                segments[p] += [segment] * len(chat.input_ids)
                pictures += shown
                positions += self._settings.positions(len(chat.input_ids), len(shown))
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
            "images": len(pictures),
            "supervised": int((filled["labels"] != IGNORED).sum()),
            "positions": positions,
            "place": [place.epoch, place.window, place.row],
            "start": [start.epoch, start.window, start.row],
            "epochs": epochs,
            "keys": keys,
            "quarantined": json.dumps(quarantined, ensure_ascii=False),
            "failed": None,
        }
        pixels = _binary(np.stack(pictures) if pictures else np.empty(0, np.uint8))
        return pa.table({name: [value] for name, value in columns.items()} | {"pixels": pixels}, schema=COLUMNS)


def _binary(array: np.ndarray) -> pa.LargeBinaryArray:
    """An array of one: these bytes. A row's pictures are megabytes, of which each copy would take as long as decoding
    some of them."""
    return pa.Array.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, array.nbytes])), pa.py_buffer(array)]
    )


def too_long_error(sample: Place, settings: OrderSettings) -> SampleError:
    positions = settings.positions(sample.tokens, sample.images)
    return SampleError("too long", f"{positions} positions, data.pack_length allows {settings.pack_length}")
