"""A worker that stands still writes down where, and ends."""

import subprocess
import sys
from pathlib import Path

from mqwen.train.watchdog import FOLDER

STALLS = """
import sys, threading, time
from mqwen.storage import locate
from mqwen.train import watchdog

watchdog.OTHERS = 0.2
dog = watchdog.Watchdog(locate(sys.argv[1]), 3, 1.0)

def goes_on(): # for longer than the limit
    for _ in range(20):
        time.sleep(0.1)
        dog.alive()

def stalls_here():
    print("stalls", flush=True)
    threading.Event().wait()

with dog.watching():
    goes_on()
with dog.watching():
    stalls_here()
"""


def test_who_stands_still_says_where_and_ends(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", STALLS, tmp_path], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.name.endswith("-rank-3.txt")
    assert "in stalls_here" in file.read_text()
    assert "in goes_on" not in file.read_text()
    first, said = found.stdout.splitlines()
    assert first == "stalls"
    assert said.startswith(
        f"rank 3 has not ended a pass for 1 s (--parallel.hang-timeout): what it was doing is in {file}"
    )
