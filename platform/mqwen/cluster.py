"""The Ray cluster that a command works on: the one that RAY_ADDRESS names, or its own on this machine's loopback.

Import this before anything that imports ray: Ray reads its authentication settings once, when it is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    # A cluster of our own asks for a token that only this process and its children know.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# What a job prints is for people: workers print once, not also through Ray Train's logger, and Ray Data says no more
# than what went wrong.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")

import psutil
import ray

GRACE = 5.0  # seconds in which what a cluster of our own consists of may end by itself


@contextmanager
def cluster(cpus: int, show_workers: bool = True) -> Iterator[str]:
    """Connects to RAY_ADDRESS; without it starts a cluster of at least `cpus` logical CPUs, ended with the block.

    A cluster of our own is small (a laptop, the demo): workers may be more than its cores, and then share them.
    `show_workers` prints what workers print. Yields the cluster's address.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING, log_to_driver=show_workers)
    else:
        ray.init(
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=True,  # on loopback; Ray Train asks it about its own actors
            logging_level=logging.WARNING,
            log_to_driver=show_workers,
        )
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which prints a stack and exits with 15
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        started = [] if "RAY_ADDRESS" in os.environ else psutil.Process().children(recursive=True)
        ray.shutdown()
        # Ray does not wait for its dashboard's helpers, and now and then one of them stays.
        _, left = psutil.wait_procs(started, timeout=GRACE)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
