"""The Ray cluster that a command works on: the one that RAY_ADDRESS names, or its own on this machine's loopback.

Import this before anything that imports ray: Ray reads its authentication settings once, when it is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    # A cluster of our own is on loopback, and asks for a token that only this process and its children know.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for: on loopback; the children need it too
else:
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # else Ray asks an address that is no cluster's for minutes

# What a job prints is for people: workers print once, not also through Ray Train's logger, and Ray Data says no more
# than what went wrong.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
# How soon a lost worker is noticed, in seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import psutil
import ray

from mqwen.errors import UserError

LOOPBACK = "127.0.0.1"
ANSWER = 5.0  # seconds in which a cluster must answer
GRACE = 5.0  # seconds in which what a cluster of our own consists of may end by itself


class ClusterError(UserError):
    """No cluster answers, or none can be started here; the message says which and what Ray says."""


@contextmanager
def cluster(cpus: int, show_workers: bool = True, dashboard: bool = True) -> Iterator[str]:
    """Connects to RAY_ADDRESS; without it starts a cluster of at least `cpus` logical CPUs, ended with the block.

    A cluster of our own is small (a laptop, the demo): workers may be more than its cores, and then share them.
    `show_workers` prints what workers print. `dashboard` is for our own; without it a cluster starts a minute sooner on
    machines without a network. Yields the cluster's address.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": show_workers}
    ours = "RAY_ADDRESS" not in os.environ
    others = set(psutil.Process().children(recursive=True))  # of the caller, and not ours to end
    if ours:
        # Also for what runs on it: without the address its processes would look for clusters, and may find another.
        os.environ["RAY_ADDRESS"] = f"{LOOPBACK}:{_free_port()}"
        os.environ["RAY_GCS_SERVER_PORT"] = os.environ["RAY_ADDRESS"].rpartition(":")[2]
        options |= {"address": "local", "num_cpus": max(cpus, os.cpu_count() or 1)}
        options |= {"include_dashboard": dashboard}  # on loopback; Ray Train asks it about its own actors
    try:
        _connect(options)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which prints a stack and exits with 15
        yield ray.get_runtime_context().gcs_address
    finally:
        started = set(psutil.Process().children(recursive=True)) - others if ours else set()
        ray.shutdown()
        if ours:
            del os.environ["RAY_ADDRESS"], os.environ["RAY_GCS_SERVER_PORT"]
        # Ray does not wait for its dashboard's helpers, and now and then one of them stays.
        _, left = psutil.wait_procs(started, timeout=GRACE)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _connect(options: dict[str, Any]) -> None:
    host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
    try:
        if "num_cpus" not in options and host and "/" not in host:
            socket.create_connection((host, int(port)), ANSWER).close()  # Ray would wait for it for minutes
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        if "num_cpus" in options:
            raise ClusterError(f"Ray does not start on this machine: {reason}") from error
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS {os.environ['RAY_ADDRESS']} ({reason}); is it up, and its token in "
            "RAY_AUTH_TOKEN? Without RAY_ADDRESS a command starts a cluster of its own"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]
