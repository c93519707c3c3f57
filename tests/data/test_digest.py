"""The contract: a step trains on the same samples in the same packs on any number of workers, after any stop."""

from collections import Counter
from dataclasses import replace
from itertools import takewhile
from random import Random

import pytest

from mqwen.data.batch import Batch
from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor
from tests.data.digest import digest, plain_rows, plain_steps, ranks_steps
from tests.data.making import IMAGE_POSITIONS, random_sample, write_dataset

WORKERS = (1, 2, 3, 4, 8)
SETTINGS = OrderSettings(
    seed=2, pack_length=90, packs_per_row=2, image_positions=IMAGE_POSITIONS, run_samples=4, window_runs=3
)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, processor: MQWenProcessor) -> dict[str, Stream]:
    """Of a dataset in which a sample cannot be read and some are too long, and of a mixture of it and another."""
    samples = [random_sample(seed) for seed in range(40)]
    samples[9].pictures[0] = b"no picture"
    datasets = [
        open_dataset(write_dataset(tmp_path_factory.mktemp(name), processor, some))
        for name, some in (("one", samples), ("two", [random_sample(seed) for seed in range(70, 90)]))
    ]
    orders = {"one": Order(datasets[:1], SETTINGS), "mixture": Order(datasets, SETTINGS, [1, 2])}
    return {name: Stream(order, processor, rows=200) for name, order in orders.items()}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cases", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_the_same_digest_on_any_workers_after_any_stop(streams: dict[str, Stream], cases: int) -> None:
    """Each case is one continuation: some steps on some workers, from where the case before stopped.

    A case asks for no more rows than it needs: its reading tasks end by themselves, and their processes read for the
    next one. (A process that is killed in the middle costs two seconds; test_stream.py has those.)
    """
    random = Random()
    seed = random.randrange(1 << 32)
    random.seed(seed)
    done = 0
    while done < cases:
        name, per_step = random.choice(("one", "mixture")), random.randint(1, 6)
        stages = [(random.choice(WORKERS), random.randint(1, 3)) for _ in range(random.randint(2, 4))]
        position, found = Position(), list[list[Batch]]()
        for workers, steps in stages:
            stream = replace(streams[name], rows=per_step * steps)
            found += ranks_steps(stream, workers, per_step, steps, position)
            position = Position.after(max(row.place for row in found[-1]))
        plain = plain_steps(streams[name], per_step, sum(steps for _, steps in stages))
        assert digest(found) == digest(plain), f"seed {seed}: {name}, {per_step} rows a step, {stages}"
        done += len(stages)


def test_the_digest_sees_what_changes(streams: dict[str, Stream]) -> None:
    """Another order of packs, another text of one, another step."""
    steps = plain_steps(streams["one"], 2, 3)
    whole = digest(steps)
    assert whole == digest(plain_steps(streams["one"], 2, 3))
    assert whole != digest(steps[::-1])
    assert whole != digest([steps[0][::-1], *steps[1:]])
    steps[1][0].inputs["input_ids"][0, 0] += 1
    assert whole != digest(steps)


def test_every_sample_once_an_epoch(streams: dict[str, Stream]) -> None:
    epoch = takewhile(lambda row: row.place[0] == 0, plain_rows(streams["one"]))
    seen = Counter(key for row in epoch for key in [*row.keys, *row.quarantined])
    assert seen == Counter(f"sample-{seed:04d}" for seed in range(40))


def test_of_a_mixture_each_dataset_has_its_share_and_its_epochs(streams: dict[str, Stream]) -> None:
    """Weights 1 and 2 of 40 and 20 samples: while the first goes by once, the second does four times."""
    order = streams["mixture"].order
    one, two = (str(dataset.location) for dataset in order.datasets)
    seen: Counter[str] = Counter()
    for row in plain_rows(streams["mixture"]):
        seen.update([*row.keys, *row.quarantined])
        if sum(seen.values()) >= 600:
            break
    counts = {place: [n for key, n in seen.items() if key.startswith(f"{place}/")] for place in (one, two)}
    assert [len(counts[place]) for place in (one, two)] == [40, 20]
    assert sum(counts[two]) / sum(counts[one]) == pytest.approx(2, rel=0.1)
    assert max(counts[one]) - min(counts[one]) <= 2 and max(counts[two]) - min(counts[two]) <= 3
