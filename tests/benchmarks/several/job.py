"""A training in a process of its own, on the cluster of RAY_ADDRESS: jobs/pretrain.py for settings that are at hand.

python -m tests.benchmarks.several.job FILE     as `write_job` wrote it

The GPU machine has no tyro, hence no command line; all else is jobs/pretrain.py's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from uuid import uuid4

import mqwen.cluster  # noqa: F401  before what imports ray
from mqwen.data.batch import Batch
from mqwen.train.loop import Progress
from mqwen.train.settings import RunSettings
from mqwen.train.worker import Feed, Rows
from tests.data.digest import Seen, digest_seen, see

# NVLink multicast can put GPUs that others share out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """Rows, as a worker reads them; each that its loop takes is written down in a file of the folder. `pause` are
    seconds before each, with which a short run lasts as long as what is to happen to it."""

    rows: Rows
    folder: str
    pause: float

    def __call__(self, part: Any, progress: Progress) -> Iterator[Batch]:
        return self._each(self.rows(part, progress))  # the first row is asked for now, as the loop would

    def _each(self, rows: Iterator[Batch]) -> Iterator[Batch]:
        with (Path(self.folder) / f"{uuid4().hex}.jsonl").open("w", buffering=1) as file:
            for row in rows:
                time.sleep(self.pause)
                file.write(json.dumps(asdict(see(row))) + "\n")
                yield row


def digest_of(settings: RunSettings, folder: Path, records: list[dict[str, Any]]) -> str:
    """The digest of what the steps of a run's records trained on, on whichever rank and after whatever loss.

    Raises AssertionError where a row that was trained again was not the same, or a step has others than its own.
    """
    rows: dict[tuple[int, ...], Seen] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            place = tuple(row.pop("place"))
            seen = Seen(place, **row)
            assert rows.setdefault(place, seen) == seen, f"two rows at {place}"
    order, steps, done = sorted(rows), list[list[Seen]](), 0
    for record in records:
        steps.append([rows[place] for place in order[done : done + settings.data.rows_per_step]])
        done += len(steps[-1])
        assert steps[-1][-1].place == tuple(record["place"]), f"step {record['step']} ended at {steps[-1][-1].place}"
    return digest_seen(steps)


def write_job(settings: RunSettings, file: Path, seen: Path | None = None, pause: float = 0.0) -> list[str]:
    """The command. `seen` is a folder for what each worker's loop receives, `pause` seconds before each row of it."""
    if seen:
        seen.mkdir()
    file.write_text(json.dumps({"settings": asdict(settings), "seen": seen and [str(seen), pause]}))
    return [sys.executable, "-m", "tests.benchmarks.several.job", str(file)]


def rebuilt(kind: type[T], raw: dict[str, Any]) -> T:
    """A dataclass from what `asdict` and JSON made of it."""
    hints = get_type_hints(kind)

    def value(name: str, found: Any) -> Any:
        if is_dataclass(hints[name]):
            return rebuilt(hints[name], found)
        return tuple(found) if isinstance(found, list) else found

    return kind(**{name: value(name, found) for name, found in raw.items()})


def watched(seen: tuple[str, float] | None, feed: Feed) -> Feed:
    rows: Rows = Recorded(feed.rows, *seen) if seen else feed.rows
    return replace(feed, rows=rows, environment=feed.environment | NO_MULTICAST)


def main(file: str) -> None:
    os.environ |= NO_MULTICAST
    from mqwen.training import run_training

    raw = json.loads(Path(file).read_text())
    run_training(rebuilt(RunSettings, raw["settings"]), partial(watched, raw["seen"]))


if __name__ == "__main__":
    main(sys.argv[1])
