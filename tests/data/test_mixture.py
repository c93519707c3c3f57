"""Mixtures: shares held at every length, counted without walking, epochs of each dataset whole."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqwen.data.mixture import Mixture, floor_sum
from mqwen.data.order import Order
from tests.data.test_order import SETTINGS, made_dataset, made_index

shares = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 10**6))
def test_floor_sum(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@settings(max_examples=100, deadline=None)
@given(shares, st.integers(0, 2**70), st.integers(0, 400))
def test_what_was_taken_before_a_slot(shares: list[float], seed: int, slot: int) -> None:
    mixture = Mixture.of(shares, seed)
    walked = Counter(mixture.at(n) for n in range(slot))
    assert mixture.before(slot) == [walked[dataset] for dataset in range(len(shares))]


@settings(max_examples=50, deadline=None)
@given(shares, st.integers(0, 2**70), st.integers(0, 10**9), st.integers(1, 10**6))
def test_any_stretch_has_the_shares(shares: list[float], seed: int, start: int, length: int) -> None:
    mixture = Mixture.of(shares, seed)
    taken = [b - a for a, b in zip(mixture.before(start), mixture.before(start + length), strict=True)]
    assert sum(taken) == length
    for share, count in zip(shares, taken, strict=True):
        assert abs(count - length * share / sum(shares)) <= 2 + math.log2(length + 1)


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 2)])
def test_epochs_belong_to_each_dataset(weights: tuple[int, ...]) -> None:
    """Every sample of an epoch before any of the next but one, and each once; samples by weight, not runs."""
    sizes = {"a": [50, 3, 20], "b": [7] * 6, "c": [5, 5]}
    order = Order([made_dataset(name, shards) for name, shards in sizes.items()], SETTINGS, weights)
    runs = [run for window in range(60) for run in order.window(0, window)]
    seen: dict[tuple[int, int], Counter] = defaultdict(Counter)
    taken = Counter[int]()
    for run in runs:
        seen[run.dataset, run.epoch].update((run.shard.name, n) for n in range(run.start, run.stop))
        taken[run.dataset] += run.stop - run.start
    for number, shards in enumerate(sizes.values()):
        epochs = sorted(epoch for dataset, epoch in seen if dataset == number)
        assert epochs == list(range(len(epochs)))
        whole = Counter((str(shard), n) for shard, size in enumerate(shards) for n in range(size))
        assert all(seen[number, epoch] == whole for epoch in epochs[:-1])
        assert taken[number] / taken.total() == pytest.approx(weights[number] / sum(weights), rel=0.12)


def test_a_plan_is_one_windows_alone_and_its_keys_name_their_dataset() -> None:
    order = Order([made_dataset(name, [30, 30]) for name in ("a", "b")], SETTINGS, (1, 1))
    again = Order([made_dataset(name, [30, 30]) for name in ("a", "b")], SETTINGS, (1, 1))
    assert [order.plan(0, n, made_index) for n in range(7)][6] == again.plan(0, 6, made_index)
    plan = order.plan(0, 6, made_index)
    assert {place.key.split("/")[1] for place in plan.samples} == {"a", "b"}
    assert len({place.key for place in plan.samples}) == len(plan.samples)
