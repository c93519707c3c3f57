"""Processes that are ready to become workers: a group that has lost one starts again without waiting for imports.

Starting Python, torch and transformers takes most of a restart. So on each node a rank asks for as many processes like
its own as there are ranks, with all imported, and waiting; Ray takes them when it starts the next workers there. On
rank 0's node it is one more, which Ray Data's coordinator takes. Reading tasks are light, and have processes of their
own kind.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import grpc
import ray
import ray.train
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated.common_pb2 import PYTHON
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.core.generated.runtime_environment_pb2 import RuntimeEnvInfo

AFTER = 20.0  # seconds from a group's start: shorter runs need none
PAUSE = 5.0  # seconds between two: Ray starts no more at once than a node has cores, and forgets the others
KEPT = 24 * 3600  # seconds
ANSWER = 10.0  # seconds
MARK = "MQWEN_SPARES"
IMPORTS = "MQWEN_SPARES_IMPORTS"


def environment(imports: Iterable[str]) -> dict[str, str]:
    """What a run's worker processes must have in their environment for their successors to be prepared.

    `imports` are modules that a worker needs.
    """
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.prepare", MARK: uuid4().hex, IMPORTS: ",".join(imports)}


def prepare() -> None:
    """Ray calls this in every such process when it starts. The first ones, for which work waits, go on at once."""
    if os.environ.get("MQWEN_ROLE") != "reader" and _wanted().exists():
        for module in os.environ[IMPORTS].split(","):
            importlib.import_module(module)


def ask() -> None:
    """On one rank of each node: has processes prepared there, if this one is still there after a while."""
    context = ray.train.get_context()
    if context.get_local_rank() == 0:
        count = context.get_local_world_size() + (context.get_world_rank() == 0)
        threading.Thread(target=_ask, args=(count,), daemon=True).start()


def _ask(count: int) -> None:
    time.sleep(AFTER)
    _wanted().touch()
    me = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == me.get_node_id())
    request = PrestartWorkersRequest(
        language=PYTHON,
        job_id=ray.JobID.from_hex(me.get_job_id()).binary(),
        runtime_env_info=RuntimeEnvInfo(serialized_runtime_env=me.get_runtime_env_string()),
        keep_alive_duration_secs=KEPT,
        num_workers=1,
    )
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address) as channel, suppress(grpc.RpcError):  # without spares a restart only takes longer
        for _ in range(count):
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER)
            time.sleep(PAUSE)


def _wanted() -> Path:
    """There once this run has asked for spares on this node."""
    return Path(ray._private.worker._global_node.get_session_dir_path()) / f"spares-{os.environ[MARK]}"
