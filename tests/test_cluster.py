"""A cluster that does not answer: one line, at once; Ray itself would try for minutes, and end with a trace. One of our
own ends what it started, and nothing else."""

import socket
import time

from tests.end_to_end.commands import shell

CONNECT = "from mqwen import cli; from mqwen.cluster import cluster; cli.run(cluster(1).__enter__)"

BESIDE = """
import subprocess, sys
beside = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
from mqwen.cluster import cluster
with cluster(1, dashboard=False):
    pass
assert beside.poll() is None
beside.communicate()
assert beside.returncode == 1  # its input has ended: it has lived until now
"""


def test_what_the_caller_started_stays() -> None:
    with shell() as found:
        found.variables = {"PYTHONPATH": "platform"}
        code, output = found.run("-c", BESIDE)
    assert code == 0, output


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as unused, shell() as found:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        found.variables = {"RAY_ADDRESS": address, "PYTHONPATH": "platform"}
        started = time.monotonic()
        code, output = found.run("-c", CONNECT)
        assert time.monotonic() - started < 30  # nearly all of it Python's imports
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith(f"error: no Ray cluster answers at RAY_ADDRESS {address} (")
    assert line.endswith("Without RAY_ADDRESS a command starts a cluster of its own")
