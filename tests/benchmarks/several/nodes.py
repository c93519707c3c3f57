"""A cluster of this machine whose GPUs belong to two nodes, of which one can be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

STORE = 4 << 30  # bytes of a node's object store


class Nodes:
    """A head that takes no work, and two nodes with so many CPUs and GPUs each."""

    def __init__(self, cpus: int, gpus: int) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
        )
        self.address: str = self._cluster.address
        self._cpus, self._gpus = cpus, gpus
        self._first = self._add(0)
        self._second = self._add(1)

    def _add(self, number: int) -> Any:
        mine = range(number * self._gpus, (number + 1) * self._gpus)
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))} if self._gpus else {}
        return self._cluster.add_node(
            num_cpus=self._cpus, num_gpus=self._gpus, object_store_memory=STORE, env_vars=shown
        )

    def lose(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def add(self) -> None:
        self._second = self._add(1)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(cpus: int, gpus: int) -> Iterator[Nodes]:
    found = Nodes(cpus, gpus)
    try:
        yield found
    finally:
        found.shutdown()
