"""A benchmark's result: printed, and written as a dated file with commit, machine and command."""

import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, text: str) -> Path:
    """`text` is Markdown. The file is results/DATE-NAME.md; a second one of the day replaces it."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "ray"))
    head = [
        f"commit {commit.stdout.strip()}",
        f"machine {_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory()} GiB; {packages}",
        f"command `{' '.join(['python -m', f'tests.benchmarks.{Path(sys.argv[0]).stem}', *sys.argv[1:]])}`",
    ]
    file = RESULTS / f"{date.today()}-{name}.md"
    file.write_text(f"# {name}\n\n" + "".join(f"- {line}\n" for line in head) + f"\n{text}\n")
    print(file.read_text())
    return file


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), os.uname().machine)


def _memory() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
