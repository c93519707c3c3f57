"""What a run trains on, step by step, as the ranks' loops receive it; and one number that stands for all of it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from mqwen.data.batch import Batch, unpack
from mqwen.data.order import Position
from mqwen.data.reader import WindowReader
from mqwen.data.stream import Stream
from mqwen.train.loop import Place

Steps = list[list[Batch]]  # of each step its rows


def plain_rows(stream: Stream) -> Iterator[Batch]:
    """The rows by a loop in this process, without Ray."""
    reader = WindowReader(stream.order, stream.processor, Position())
    for window in range(1 << 30):
        for table in reader.rows(window):
            yield unpack(table, stream.order.settings.packs_per_row, stream.processor.image_size)


def plain_steps(stream: Stream, per_step: int, steps: int) -> Steps:
    rows = plain_rows(stream)
    return [list(islice(rows, per_step)) for _ in range(steps)]


def ranks_steps(
    stream: Stream,
    workers: int,
    per_step: int,
    steps: int,
    position: Position,
    on_step: Callable[[int, int], None] = lambda rank, step: None,
) -> Steps:
    """What the loops of `workers` ranks receive in `steps` steps from a position on, by the loop's rule."""
    parts = stream.split(position, workers)

    def rank_steps(rank: int) -> Steps:
        rows, found = stream.read(parts[rank], position, 1.0), []
        for step in range(steps):
            mine = sum((step * per_step + i) % workers == rank for i in range(per_step))
            found.append(list(islice(rows, mine)))
            assert len(found[-1]) == mine
            on_step(rank, step)
        return found

    with ThreadPoolExecutor(workers) as pool:
        ranks = list(pool.map(rank_steps, range(workers)))
    return [sorted((row for rank in ranks for row in rank[step]), key=lambda row: row.place) for step in range(steps)]


@dataclass(frozen=True)
class Seen:
    """A row that a loop received: its place, its samples' keys, and SHA-256 over all that it holds, as tensors."""

    place: Place
    keys: list[str]
    sha256: str


def see(row: Batch) -> Seen:
    sha = hashlib.sha256()
    sha.update(json.dumps([row.place, row.keys, row.quarantined, row.supervised, row.positions]).encode())
    for name in sorted(row.inputs):
        sha.update(f"{name} {row.inputs[name].dtype} {tuple(row.inputs[name].shape)}".encode())
        sha.update(row.inputs[name].numpy().tobytes())
    return Seen(row.place, row.keys, sha.hexdigest())


def digest(steps: Steps) -> str:
    return digest_seen([[see(row) for row in rows] for rows in steps])


def digest_seen(steps: list[list[Seen]]) -> str:
    """SHA-256 over, of each step, its sorted keys and its rows."""
    sha = hashlib.sha256()
    for step, rows in enumerate(steps):
        sha.update(json.dumps([step, sorted(key for row in rows for key in row.keys)]).encode())
        sha.update(json.dumps([row.sha256 for row in rows]).encode())
    return sha.hexdigest()
