"""Trainings whose workers are killed: started, heard line by line, and timed from a kill to the next step."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"pid=(\d+).*step \d+/")


def training_workers() -> list[psutil.Process]:
    """Those of the cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def follow(
    command: list[str], environment: dict[str, str], heard: Callable[[str], None], limit: float | None = None
) -> None:
    """Runs a command from the repository's root, to its end; `heard` gets each line when it is said.

    Raises RuntimeError, with the last of what was said, where it fails, or does not end within `limit` seconds.
    """
    with subprocess.Popen(
        command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        end = threading.Timer(limit, process.kill) if limit else None
        if end:
            end.start()
        said = ""
        try:
            for line in process.stdout:
                said = said[-5000:] + line
                heard(line)
        except BaseException:
            process.kill()
            raise
        finally:
            if end:
                end.cancel()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{said}")


class Kills:
    """Hears a training and kills workers of it, `most` times.

    `due` is asked, with the line and the seconds since the group's first step, whether to kill now, and `choose` whom.
    `began` is when the first step ended, by time.monotonic(); `took` are seconds from each kill to the next step.
    """

    def __init__(
        self,
        most: int,
        due: Callable[[str, float], bool],
        choose: Callable[[list[psutil.Process]], psutil.Process],
    ) -> None:
        self.began: float | None = None
        self.took: list[float] = []
        self._most, self._due, self._choose = most, due, choose
        self._group = self._killed = 0.0  # when this group's first step ended, and when the last was killed
        self._old: set[int] = set()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if (found := STEP.search(line)) and int(found[1]) not in self._old:
            if self.began is None:
                self.began = self._group = now
            if self._killed:
                self.took.append(now - self._killed)
                self._killed, self._group = 0.0, now
                print(f"kill {len(self.took)}: {self.took[-1]:.1f} s", flush=True)
        working = self._group and not self._killed
        if working and len(self.took) < self._most and self._due(line, now - self._group):
            workers = training_workers()
            self._old |= {one.pid for one in workers}
            self._choose(workers).kill()
            self._killed = time.monotonic()
