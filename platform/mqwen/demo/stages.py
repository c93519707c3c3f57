"""Runs the demo's stages: each a command as a user would type it, with its time, and all of them ended at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from mqwen.errors import UserError

GRACE = 30.0  # seconds that a command may take to end what it started


class StageError(UserError):
    """A stage's command failed; what it printed says why."""


@dataclass
class Stages:
    """Times of the stages so far, each with the figure that it is shown with."""

    jobs: Path
    environment: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times the block. It is given a function that takes the stage's figure."""
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield lambda figure: self.figures.update({name: figure})
        self.seconds[name] = time.monotonic() - started

    def job(self, stage: str, script: str, *words: str, **options: object) -> None:
        """Runs a script of jobs/ as a stage; the last line it prints is the figure. Raises StageError where it fails.

        Options are named as on the command line, with _ for - and __ for the dot.
        """
        command = [sys.executable, str(self.jobs / script), *words]
        for name, value in options.items():
            command += [f"--{name.replace('__', '.').replace('_', '-')}", str(value)]
        with self.stage(stage) as figure, self.running(command, subprocess.PIPE) as process:
            assert process.stdout is not None
            line = ""
            for line in process.stdout:
                print(line, end="", flush=True)
            if code := process.wait():
                raise StageError(f"{' '.join(command)} ended with exit code {code}")
            figure(line.strip())

    @contextmanager
    def running(self, command: list[str], output: int | IO) -> Iterator[subprocess.Popen]:
        """A command that runs during the block and has ended, with all it started, after it."""
        # In a session of its own a command does not see the terminal's Ctrl-C: it is ended here, once and in order.
        process = subprocess.Popen(
            command,
            env=os.environ | self.environment,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Interrupts a process that leads a session, and kills what is left of its group after GRACE seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class PeakMemory:
    """The most memory that this process and all below it held at once, in bytes, shared pages counted once."""

    def __init__(self, every: float = 3.0) -> None:
        self.bytes = 0
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._every):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.Error):  # it may have ended meanwhile
                    total += process.memory_full_info().pss
            self.bytes = max(self.bytes, total)
