"""The commands of jobs/ as a user types them, on processes that can all be found again."""

import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import psutil

ROOT = Path(__file__).parents[2]
MARK = "MQWEN_TEST_MARK"


@dataclass
class Shell:
    """Runs commands from the repository's root; all they start carries `mark` in its environment.

    Ray's files go into `ray_folder`: as long as it is empty, no Ray was started.
    """

    ray_folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *words: object, **options: object) -> subprocess.Popen[str]:
        """`python WORDS`, in a session of its own, both outputs in one pipe."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {MARK: self.mark, "RAY_TMPDIR": str(self.ray_folder), "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
        return inherited | own | self.variables

    def run(self, *words: object) -> tuple[int, str]:
        """Exit code and output."""
        with self.start(*words) as process:
            output, _ = process.communicate(timeout=500)
        return process.returncode, output

    def done(self, *words: object) -> str:
        """The output of a command that must do its work."""
        code, output = self.run(*words)
        assert code == 0, output
        return output

    def processes(self) -> list[psutil.Process]:
        def belongs(process: psutil.Process) -> bool:
            try:
                return process.environ().get(MARK) == self.mark
            except psutil.Error:
                return False

        return [process for process in psutil.process_iter() if belongs(process)]


@contextmanager
def shell() -> Iterator[Shell]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    shell = Shell(folder)
    try:
        yield shell
    finally:
        for process in shell.processes():
            process.kill()
        rmtree(folder, ignore_errors=True)


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """What a command prints, up to the first line in which the pattern is found."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if re.search(pattern, line):
            return output
    raise AssertionError(f"{pattern!r} is not in what was printed:\n{output}")


# The demo's model with less of everything.
SMALL = ["--recipe", "demo", "--data.pack-length", "128", "--data.packs-per-row", "1", "--data.rows-per-step", "3"]
