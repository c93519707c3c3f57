"""How many replicas there are, and which of them a request goes to: both as plain functions, without Ray."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from serve.conversation import affinity
from serve.routing import AffinityRouter
from serve.scaling import RequestsAndCache
from serve.task import ChatTask
from tests.engine.tiny import picture


def replicas_wanted(requests: float, usages: list[float]) -> float:
    config = AutoscalingConfig(target_ongoing_requests=8, max_replicas=9)
    usage = {"kv_usage": {str(number): value for number, value in enumerate(usages)}}
    context: Any = SimpleNamespace(total_num_requests=requests, aggregated_metrics=usage, config=config)
    wanted, _ = RequestsAndCache(0.5)(context)
    return wanted


def test_replicas_follow_requests_and_the_cache() -> None:
    assert replicas_wanted(0, []) == 0
    assert replicas_wanted(20, [0.1]) == 2.5
    assert replicas_wanted(2, [0.9]) == pytest.approx(1.8)  # few requests, and long ones
    assert replicas_wanted(2, [0.9, 0.9]) == pytest.approx(3.6)
    assert replicas_wanted(2, [0.1, 0.1]) == pytest.approx(0.4)


class Cluster:
    """A router over replicas of 16 requests each; `busy` as it has heard of them."""

    def __init__(self, *names: str) -> None:
        self.replicas: list[Any] = [
            SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), max_ongoing_requests=16) for name in names
        ]
        self.busy: dict[str, int] = {}
        self._router: Any = AffinityRouter.__new__(AffinityRouter)
        self._router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: self.busy.get(replica.unique_id))
        for one in self.replicas:
            one.replica_id = _Id(one.replica_id.unique_id)

    def choose(self, key: str) -> list[list[str]]:
        pending: Any = SimpleNamespace(args=[ChatTask([], [], affinity=key)])
        ranks = asyncio.run(self._router.choose_replicas(self.replicas, pending))
        return [[one.replica_id.unique_id for one in rank] for rank in ranks]

    def first(self, key: str) -> str:
        return self.choose(key)[0][0]


class _Id(str):
    __slots__ = ()

    @property
    def unique_id(self) -> str:
        return str(self)


KEYS = [f"conversation {number}" for number in range(300)]


def test_conversations_stay_and_spread() -> None:
    one, other = Cluster("a", "b", "c"), Cluster("c", "a", "b")
    assert [one.first(key) for key in KEYS] == [other.first(key) for key in KEYS]
    assert all(60 < count < 140 for count in Counter(map(one.first, KEYS)).values())
    assert sorted(name for rank in one.choose("x") for name in rank) == ["a", "b", "c"]  # all others are tried after it


def test_with_another_replica_only_those_that_it_takes_move() -> None:
    before, after = Cluster("a", "b", "c"), Cluster("a", "b", "c", "d")
    moved = [after.first(key) for key in KEYS if after.first(key) != before.first(key)]
    assert set(moved) == {"d"}
    assert 40 < len(moved) < 110


def test_a_busy_replica_is_passed_over_until_it_is_not() -> None:
    cluster = Cluster("a", "b", "c")
    mine = [key for key in KEYS if cluster.first(key) == "a"]
    cluster.busy = {"a": 4, "b": 0}
    assert {cluster.first(key) for key in mine} == {"a"}
    cluster.busy = {"a": 5, "b": 0}
    assert {cluster.first(key) for key in mine} == {"b", "c"}
    cluster.busy = {"a": 15, "b": 14, "c": 15}
    assert {cluster.first(key) for key in mine} == {"a"}


def test_what_turns_of_a_conversation_have_in_common() -> None:
    one, other = picture(1), picture(2)
    image = {"type": "image"}

    def asked(text: str) -> dict[str, Any]:
        return {"role": "user", "content": [image, {"type": "text", "text": text}]}

    begun = [{"role": "system", "content": "s"}, asked("What is it?")]
    later = [*begun, {"role": "assistant", "content": "A cat."}, asked("And this?")]
    assert affinity(None, begun, [one]) == affinity(None, later, [one, other])
    assert affinity(None, begun, [one]) == affinity(None, [asked("How many?")], [one])  # the picture is what costs
    assert affinity(None, begun, [one]) != affinity(None, begun, [other])
    assert affinity(None, begun, [one]) != affinity("poems", begun, [one])
    text = [{"role": "user", "content": "Hello"}]
    more = [*text, {"role": "assistant", "content": "Yes?"}, asked("This?")]
    assert affinity(None, text, []) == affinity(None, more, [one])
    assert affinity(None, text, []) != affinity(None, [{"role": "user", "content": "Bye"}], [])
