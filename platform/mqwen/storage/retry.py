"""What storage refuses for a while is asked for again: a run outlives a server that restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from mqwen.storage.errors import MissingFileError, StorageError, TruncatedFileError
from mqwen.telemetry import storing

PATIENCE = 600.0  # seconds
LONGEST_PAUSE = 15.0  # seconds
T = TypeVar("T")


def retried(work: Callable[[], T], until: float | None = None) -> T:
    """What `work` gives, tried again with growing pauses: until `until`, a moment of time.monotonic, or for PATIENCE
    seconds. Raises StorageError where the time is up; at once where a file is missing or cut short: that stays so.
    """
    limit, pause = time.monotonic() + PATIENCE if until is None else until, 1.0
    while True:
        try:
            return work()
        except (MissingFileError, TruncatedFileError):
            raise
        except StorageError as error:
            storing.FAILED_REQUESTS.add()
            if time.monotonic() + pause > limit:
                raise
            print(f"{error}; trying again in {pause:.0f} s", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
