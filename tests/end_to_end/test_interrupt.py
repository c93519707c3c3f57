"""Ctrl-C and SIGTERM: the demo ends, and with it the cluster, the workers and the commands that it started."""

import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.commands import read_until, shell

LIMIT = 60  # seconds in which the command must have ended
GRACE = 10  # and after it what it started


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses on which these can be reached."""
    addresses = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            addresses |= {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return addresses


@pytest.mark.parametrize(
    ("number", "moment", "code"),
    [
        (signal.SIGTERM, "== ingest", 143),
        pytest.param(signal.SIGINT, r"step \d+/2000", 130, marks=pytest.mark.soak),
    ],
)
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: int, moment: str, code: int) -> None:
    with shell() as found:
        with found.start("jobs/demo.py", "--out", tmp_path / "demo", "--pictures", 600, "--steps", 2000) as process:
            output = read_until(process, moment)
            assert len(found.processes()) > 5  # cluster and workers are there
            assert listening(found.processes()) <= {"127.0.0.1", "::ffff:127.0.0.1"}
            process.send_signal(number)
            rest, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == code, output + rest
        # The forkserver of Ray's dashboard ends by itself, a moment after the dashboard.
        _, left = psutil.wait_procs(found.processes(), timeout=GRACE)
        assert left == []
        assert "Traceback" not in rest
