"""One driver a run: a second one under the same name would write into the first one's checkpoints, so it is refused.

RUN/driver-ID.json     who drives the run; written anew every BEAT seconds, gone when it ends

Who starts writes a claim of its own and then looks for others': of two that start at once each sees the other. A claim
whose driver has ended counts no more. On this machine that is known at once, of others' after LEASE seconds without a
beat; no two clocks are compared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

import psutil

from mqwen.errors import UserError
from mqwen.storage import Location, MissingFileError, StorageError

PREFIX = "driver-"
BEAT, LEASE = 5.0, 20.0  # seconds


class RunInUseError(UserError):
    """Another driver works on the run; the message names it and the way out."""


@dataclass(frozen=True)
class Driver:
    """A process and the moment it started: process numbers come again. `beat` counts."""

    host: str
    pid: int
    started: float
    beat: int = 0

    @classmethod
    def this(cls) -> Driver:
        process = psutil.Process()
        return cls(_host(), process.pid, process.create_time())

    @property
    def here(self) -> bool:
        """On this machine, whose process numbers say whether it lives."""
        return self.host == _host()


@contextmanager
def claimed(run: Location) -> Iterator[None]:
    """Holds the run for the time of the block. Raises RunInUseError where another driver does."""
    mine, me = run / f"{PREFIX}{uuid4().hex}.json", Driver.this()
    _write(mine, me)
    try:
        for name in run.sizes():
            if name.startswith(PREFIX) and name != mine.name:
                _require_ended(run, run / name)
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(run, mine, me, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
    finally:
        with suppress(StorageError):  # what stays is known to be without a driver
            mine.delete()


def drivers(run: Location) -> list[Driver]:
    """Who holds the run or did, but for those of this machine that have ended."""
    found = [_read(run / name) for name in run.sizes() if name.startswith(PREFIX)]
    return [one for one in found if one and (not one.here or _lives_here(one))]


def _require_ended(run: Location, other: Location) -> None:
    """Raises RunInUseError where a claim's driver lives; deletes the claim where not."""
    found = _read(other)
    if found and found.here:
        alive = _lives_here(found)
    else:
        alive, limit = False, time.monotonic() + LEASE
        while found and not alive and time.monotonic() < limit:
            time.sleep(min(1.0, LEASE / 10))
            now = _read(other)
            alive, found = now is not None and now != found, now
    if found and alive:
        raise RunInUseError(
            f"run {run} is being trained by process {found.pid} on {found.host.split()[0]}: wait for it or end it, or "
            "give another --name to start a new run"
        )
    other.delete()


def _lives_here(driver: Driver) -> bool:
    try:
        return psutil.Process(driver.pid).create_time() == driver.started
    except psutil.Error:
        return False


def _beat(run: Location, mine: Location, me: Driver, ended: threading.Event) -> None:
    """Until the block ends. Storage that fails is asked again; a claim that is gone ends this process."""
    number = 0
    while not ended.wait(BEAT):
        number += 1
        with suppress(StorageError):
            if mine.size() is None:
                others = any(name.startswith(PREFIX) for name in run.sizes())
                what = "was taken over by another driver" if others else "lost its folder"
                print(f"run {run} {what}: this one stops", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)  # a job in the background of a shell ignores Ctrl-C's
                return
            _write(mine, replace(me, beat=number))


def _write(claim: Location, driver: Driver) -> None:
    claim.write_bytes(json.dumps(asdict(driver)).encode())


def _read(claim: Location) -> Driver | None:
    try:
        return Driver(**json.loads(claim.read_bytes()))
    except MissingFileError:
        return None


def _host() -> str:
    """This machine's name with its space of process numbers, of which containers have their own."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink() if space.is_symlink() else ''}".strip()
