"""Which replica a chat goes to: the one that has its prefix and pictures in its caches, unless that one is busy."""

import hashlib
import random

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.task import ChatTask

SLACK = 0.25  # of a replica's requests: by so many it may be ahead of the least busy one and still be preferred


class AffinityRouter(RequestRouter):
    """Rendezvous hashing of a task's affinity over the replicas.

    Each pair of an affinity and a replica has a rank that anybody can compute: ingress replicas agree without a word,
    and when a replica comes or goes, only the conversations of that one move.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one preferred, then all others, of which Serve takes the least busy that has room."""
        affinity = _affinity(pending_request)
        if len(candidate_replicas) < 2 or not affinity:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        ranked = sorted(candidate_replicas, key=lambda one: rank(affinity, one.replica_id.unique_id), reverse=True)
        length = {one.replica_id: self._length(one.replica_id) for one in ranked}
        least = min(length.values())
        preferred = next(one for one in ranked if length[one.replica_id] <= least + SLACK * one.max_ongoing_requests)
        return [[preferred], [one for one in ranked if one is not preferred]]

    def _length(self, replica: ReplicaID) -> int:
        """Requests of a replica as last heard; none where nothing was."""
        return self.replica_queue_len_cache.get(replica) or 0


def rank(affinity: str, replica: str) -> bytes:
    return hashlib.sha256(f"{affinity} {replica}".encode()).digest()


def _affinity(pending: PendingRequest | None) -> str:
    task = pending.args[0] if pending is not None and pending.args else None
    return task.affinity if isinstance(task, ChatTask) else ""
