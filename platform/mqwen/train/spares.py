"""Processes that are ready to become workers: a group that has lost one starts again without waiting for imports.

Starting Python, torch and transformers takes most of a restart. So on each node a rank has processes prepared that wait
with all imported that the run's first ones had imported by then, and Ray takes them when it starts the next workers
there: as many as there are ranks, and as many for reading as windows are read first, because those that read for the
lost group end with it. Rank 0 asks for one more of these, for what lists the windows, and for as many as a group has
actors of its own, on the nodes where they are.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK
from ray.core.generated.common_pb2 import PYTHON
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.core.generated.runtime_environment_pb2 import RuntimeEnvInfo

AFTER = 5.0  # seconds of the first group's work: shorter runs need none
PAUSE = 5.0  # seconds between requests: Ray starts no more at once than a node has cores, and forgets the others
KEPT = 24 * 3600  # seconds
TOLD = 2.0  # seconds in which a process has written down what it has imported
ANSWER = 10.0  # seconds
WINDOWS = 2  # a rank's, read at once
OWN = {"SynchronizationActor", "DatasetManager", "PreemptionWatcher", "SplitCoordinator"}  # actors of each group
MARK = "MQWEN_SPARES"
READERS = "MQWEN_SPARES_READERS"


def environment(readers: dict[str, str]) -> dict[str, str]:
    """What a run's worker processes must have in their environment for their successors to be prepared.

    `readers` is what those of reading tasks have beside.
    """
    return {HOOK: f"{__name__}.prepare", MARK: uuid4().hex, READERS: json.dumps(readers)}


def prepare() -> None:
    """Ray calls this in every such process when it starts. The first ones, for which work waits, go on at once."""
    if not _folder().exists():
        threading.Thread(target=_tell, daemon=True, name="spares").start()
        return
    for told in _folder().glob(f"{_kind()}-*"):
        for module in told.read_text().splitlines():
            with suppress(Exception):  # some cannot be imported by that name; they come with another
                importlib.import_module(module)


def _tell() -> None:
    """What this process has imported once spares are asked for: its successors will need it as well."""
    while not _folder().exists():
        time.sleep(TOLD / 4)
    (_folder() / f"{_kind()}-{os.getpid()}").write_text("\n".join(list(sys.modules)))


def _kind() -> str:
    return "reader" if json.loads(os.environ[READERS]).items() <= os.environ.items() else "worker"


def ask() -> None:
    """On one rank of each node: has processes prepared, if this one is still there after a while."""
    import ray.train  # not by readers, for which it is a second more

    context = ray.train.get_context()
    if context.get_local_rank() == 0:
        ranks, first = context.get_local_world_size(), context.get_world_rank() == 0
        threading.Thread(target=_ask, args=(ranks, first), daemon=True).start()


def _ask(ranks: int, first: bool) -> None:
    if not _folder().exists():  # on this node; a group that has lost workers may soon lose more
        time.sleep(AFTER)
        _folder().mkdir(exist_ok=True)
        time.sleep(TOLD)
    me = ray.get_runtime_context()
    here, mine = me.get_node_id(), me.get_runtime_env_string()
    # In the order in which a group needs them: the next one may be lost before all are there.
    wanted = Counter({(here, mine): ranks})
    if first:
        wanted.update(_actors())
    wanted[here, _for_reading(mine)] += WINDOWS * ranks + first
    nodes = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes()}
    for number, (node, runtime_env) in enumerate(wanted.elements()):
        if number and number % (os.cpu_count() or 1) == 0:
            time.sleep(PAUSE)
        request = PrestartWorkersRequest(
            language=PYTHON,
            job_id=ray.JobID.from_hex(me.get_job_id()).binary(),
            num_workers=1,
            runtime_env_info=RuntimeEnvInfo(serialized_runtime_env=runtime_env),
            keep_alive_duration_secs=KEPT,
        )
        with init_grpc_channel(nodes[node]) as channel, suppress(grpc.RpcError):  # without one it only takes longer
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER)


def _for_reading(runtime_env: str) -> str:
    """Letter by letter as Ray will write it when a reading task is started: it compares hashes."""
    found = json.loads(runtime_env)
    found["env_vars"] |= json.loads(os.environ[READERS])
    return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _actors() -> Counter[tuple[str, str]]:
    """Node and runtime environment of those actors of this job that are started for each group, and how many."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table = ray._private.state.state._connect_and_get_accessor().get_actor_table(job, "ALIVE")
    actors = [ActorTableData.FromString(one) for one in table]
    own = [one for one in actors if one.class_name in OWN]
    return Counter((one.address.node_id.hex(), one.serialized_runtime_env) for one in own)


def _folder() -> Path:
    """There once this run has asked for spares on this node: what each of its processes had imported by then."""
    return Path(ray._private.worker._global_node.get_session_dir_path()) / f"spares-{os.environ[MARK]}"
