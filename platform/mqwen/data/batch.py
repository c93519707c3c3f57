"""A row as the model's arguments.

Shapes: P packs, T tokens of the longest of them (a picture is one placeholder token), I pictures of 3 x H x W.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch


@dataclass(frozen=True)
class Batch:
    """`inputs`: input_ids, labels, segment_ids (P, T) int64 and pixel_values (I, 3, H, W) uint8.

    `start` is where the stream that it came through began, `epochs` how many of them are over with this row.
    `quarantined` maps the keys of samples that could not be
    read, and are masked where they stand, to the reason; `keys` are all the others.
    """

    inputs: dict[str, torch.Tensor]
    supervised: int
    positions: int
    images: int
    place: tuple[int, int, int]
    start: tuple[int, int, int]
    epochs: float
    keys: list[str]
    quarantined: dict[str, str]


def unpack(table: pa.Table, packs: int, side: int) -> Batch:
    """The row in a table of one, with `packs` packs and pictures of `side` x `side` pixels."""
    (columns,) = table.drop_columns(["input_ids", "labels", "segment_ids", "pixels", "failed"]).to_pylist()
    inputs = {
        name: torch.from_numpy(table[name].combine_chunks().flatten().to_numpy().astype(np.int64)).view(packs, -1)
        for name in ("input_ids", "labels", "segment_ids")
    }
    pixels = np.frombuffer(table["pixels"][0].as_buffer(), np.uint8).copy()
    inputs["pixel_values"] = torch.from_numpy(pixels).view(columns["images"], 3, side, side)
    return Batch(
        inputs=inputs,
        supervised=columns["supervised"],
        positions=columns["positions"],
        images=columns["images"],
        place=tuple(columns["place"]),
        start=tuple(columns["start"]),
        epochs=columns["epochs"],
        keys=columns["keys"],
        quarantined=json.loads(columns["quarantined"]),
    )
