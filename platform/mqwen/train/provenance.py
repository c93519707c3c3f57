"""Where a run came from: one file for each start, so that a result can be traced to code, versions and job.

RUN/starts/2026-11-22T21-30-00Z.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import ray

from mqwen.storage import Location

FOLDER = "starts"
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft", "pyarrow", "numpy", "pillow", "tiktoken")


@dataclass(frozen=True)
class Start:
    """`commit` ends in -dirty where files differed from it, and is None where there is no git. `job` is Ray's id."""

    time: str
    command: list[str]
    commit: str | None
    python: str
    packages: dict[str, str]
    job: str


def record_start(run: Location) -> None:
    """Writes how this process was started. Ray must be connected."""
    start = Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        commit=os.environ.get("MQWEN_COMMIT") or _commit(),  # a submitted job has no .git beside it
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        job=ray.get_runtime_context().get_job_id(),
    )
    name = start.time.replace(":", "-").replace("+00-00", "Z")
    (run / FOLDER / f"{name}.json").write_bytes(json.dumps(asdict(start), indent=1).encode())


def last_start(run: Location) -> Start | None:
    """The latest start, or None for a run that has not come to one."""
    names = (run / FOLDER).names()
    return Start(**json.loads((run / FOLDER / names[-1]).read_bytes())) if names else None


def _commit() -> str | None:
    def git(*words: str) -> str:
        folder = str(Path(__file__).parent)
        return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
