"""Ends a worker that stands still, after it has written down where.

RUN/stacks/TIME-rank-N.txt    what each thread of the process was doing

Ranks wait for each other in every step: where one stalls all do, and each writes its own. Then they end, and Ray starts
the group again from the last checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from mqwen.storage import Location, StorageError

FOLDER = "stacks"
LONGEST_LOOK = 5.0  # seconds between two looks
OTHERS = 10.0  # seconds that other ranks have to write theirs: the first one that ends brings the group down


class Watchdog:
    """`alive` is called after each forward pass; after `limit` seconds without it the process ends."""

    def __init__(self, run: Location, rank: int, limit: float) -> None:
        self._run, self._rank, self._limit = run, rank, limit
        self._last = time.monotonic()

    def alive(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True, name="watchdog")
        watcher.start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(LONGEST_LOOK, self._limit / 10)):
            if time.monotonic() - self._last > self._limit:
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
                file = self._run / FOLDER / f"{now}-rank-{self._rank}.txt"
                with suppress(StorageError):
                    file.write_bytes(stacks().encode())
                print(
                    f"rank {self._rank} has not ended a pass for {self._limit:g} s (--parallel.hang-timeout): what it "
                    f"was doing is in {file}; the workers start again from the last checkpoint",
                    flush=True,
                )
                if not ended.wait(OTHERS):
                    os._exit(1)  # the thread that hangs cannot be asked


def stacks() -> str:
    """What each thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for number, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)
