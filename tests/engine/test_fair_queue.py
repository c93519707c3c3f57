"""Turns by key: who was served least is next."""

import asyncio
from collections import Counter

import numpy as np

from mqwen.engine.outbox import Outbox
from mqwen.engine.request import Request
from mqwen.engine.scheduler import FairQueue
from mqwen.engine.sequence import Sequence
from mqwen.engine.text import TextStream


def sequence(key: str, number: int = 0) -> Sequence:
    async def make() -> Outbox:
        return Outbox(streams=False)

    request = Request(f"{key}{number}", [1], key=key)
    return Sequence(request, np.array([1]), [], 4, TextStream(lambda _: b""), asyncio.run(make()))


def serve(queue: FairQueue, positions: int) -> str:
    first = queue.first()
    queue.pop()
    queue.charge(first.request.key, positions)
    queue.ended(first)
    return first.request.key


def test_one_key_is_first_come_first_served() -> None:
    queue = FairQueue()
    waiting = [sequence("a", number) for number in range(4)]
    for one in waiting:
        queue.push(one)
    assert [(queue.first(), queue.pop())[0] for _ in range(4)] == waiting
    assert len(queue) == 0


def test_keys_are_served_alike_however_many_requests_they_have_waiting() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(sequence("greedy", number))
    for number in range(10):
        queue.push(sequence("modest", number))
    served = Counter(serve(queue, 10) for _ in range(20))
    assert served == {"greedy": 10, "modest": 10}


def test_a_key_with_long_requests_gets_fewer() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(sequence("long", number))
        queue.push(sequence("short", number))
    served: Counter[str] = Counter()
    for _ in range(44):
        key = queue.first().request.key
        served[serve(queue, 30 if key == "long" else 10)] += 1
    assert abs(served["short"] - 3 * served["long"]) <= 4


def test_a_key_that_rested_has_saved_nothing_up() -> None:
    queue = FairQueue()
    for number in range(20):
        queue.push(sequence("busy", number))
    for _ in range(5):
        serve(queue, 10)
    for number in range(20):
        queue.push(sequence("new", number))
    assert {serve(queue, 10) for _ in range(2)} == {"busy", "new"}


def test_who_was_preempted_is_first_of_its_key() -> None:
    queue = FairQueue()
    first, second = sequence("a", 1), sequence("a", 2)
    queue.push(first)
    queue.push(second)
    queue.pop()
    queue.push_back(first)
    assert queue.first() is first
    assert len(queue) == 2
    queue.remove(first)
    queue.remove(second)
    queue.push(sequence("b"))
    assert queue.first().request.key == "b"
