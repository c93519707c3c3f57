"""What a row trained on, found again from the order alone: which samples, where from, how long."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mqwen.data.encode import encode
from mqwen.data.errors import SampleError
from mqwen.data.order import Place
from mqwen.data.reader import WindowReader
from mqwen.data.row import too_long_error
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample


@dataclass(frozen=True)
class Traced:
    """A sample that a row held. `place` is the row's epoch, window and number, `pack` counts in the row, -1 for none.

    `positions` are those that it takes, of which `tokens` are text and a placeholder for each of its `images`.
    `reason` says why it was left out, or "".
    """

    place: tuple[int, int, int]
    pack: int
    key: str
    source: str
    tokens: int
    images: int
    positions: int
    reason: str


def trace(reader: WindowReader, last: tuple[int, int, int]) -> Iterator[Traced]:
    """The samples of the rows from the reader's start to the one whose place is `last`. Reads no other samples."""
    for number in itertools.count():
        plan = reader.plan(number)
        epoch, window = reader.place(number)
        is_last = (epoch, window) == last[:2]
        for row in range(reader.start.row if number == 0 else 0, last[2] + 1 if is_last else len(plan.rows)):
            packs = [[plan.samples[i] for i in pack] for pack in plan.rows[row]]
            samples = Samples(reader.order.datasets, [place for pack in packs for place in pack])
            for n, pack in enumerate(packs):
                for place in pack:
                    yield _traced(reader, (epoch, window, row), n, place, samples.read(place))
            for i in plan.too_long[row]:
                too_long = too_long_error(plan.samples[i], reader.order.settings)
                yield _traced(reader, (epoch, window, row), -1, plan.samples[i], too_long)
        if is_last:
            return


def _traced(
    reader: WindowReader, row: tuple[int, int, int], pack: int, place: Place, found: Sample | SampleError
) -> Traced:
    source, reason = found.source if isinstance(found, Sample) else "", ""
    try:
        encode(reader.processor, found)
    except SampleError as error:
        reason = str(error)
    positions = reader.order.settings.positions(place.tokens, place.images)
    return Traced(row, pack, place.key, source, place.tokens, place.images, positions, reason)
