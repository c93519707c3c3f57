"""How well the order shuffles, beside a full permutation of all samples.

python -m tests.benchmarks.shuffle [--samples 1000000]

The order moves runs of 64 neighbours and shuffles inside of windows of 16 runs (its defaults). What that costs is
measured on a dataset that is sorted in the worst way: by class, a thousand of them, neighbours alike. A batch is 256
samples in the order of training, before packing.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import tyro

from mqwen.data.dataset import Dataset
from mqwen.data.manifest import INDEX_SCHEMA, Manifest, Shard, Shards
from mqwen.data.order import Order, OrderSettings
from mqwen.storage import locate
from tests.benchmarks.result import write_result

SHARD = 2048
BATCH = 256
CLASSES = 1000


@dataclass(frozen=True)
class Shuffle:
    samples: int = 1_000_000
    seed: int = 0


def epoch_of(settings: Shuffle, epoch: int, run_samples: int, window_runs: int) -> np.ndarray:
    """The samples' numbers in the order of an epoch."""
    starts = range(0, settings.samples, SHARD)
    shards = [Shard(f"{n}", "", min(SHARD, settings.samples - n), 0, 0, 0, "", "") for n in starts]
    place = locate("/none")

    def index(_: Dataset, shard: Shard) -> pa.Table:
        zeros, first = [0] * shard.samples, int(shard.name)
        columns = {"key": [""] * shard.samples, "offset": range(first, first + shard.samples), "nbytes": zeros}
        columns |= {"tokens": zeros, "images": zeros, "sha256": [""] * shard.samples}
        return pa.table(columns, schema=INDEX_SCHEMA)

    dataset = Dataset(place, Manifest(Shards(map(asdict, shards)), "", {}), place)
    order = Order([dataset], OrderSettings(settings.seed, 1, 1, 1, run_samples, window_runs))
    plans = (order.plan(epoch, window, index) for window in range(order.windows))
    return np.array([place.offset for plan in plans for place in plan.samples])


def figures(one: np.ndarray, two: np.ndarray) -> list[str]:
    """Of an epoch, and of it beside the next one."""
    batches = one[: len(one) // BATCH * BATCH].reshape(-1, BATCH)
    classes = batches * CLASSES // len(one)
    distinct = np.mean([len(set(batch)) for batch in classes])
    commonest = np.mean([np.bincount(batch).max() for batch in classes])
    # The deviation of a batch's mean class from all classes' mean: what a gradient over it would be biased by.
    spread = np.std(classes.mean(axis=1)) / (CLASSES / np.sqrt(12 * BATCH))
    ranks = np.corrcoef(np.arange(len(one)), one)[0, 1]
    batch_of = np.empty(len(one), int)
    batch_of[two] = np.arange(len(two)) // BATCH
    again = np.mean(batch_of[one[:-1]] == batch_of[one[1:]]) * len(one) / BATCH
    return [f"{distinct:.1f}", f"{commonest:.1f}", f"{spread:.2f}", f"{ranks:+.4f}", f"{again:.1f}"]


def main() -> None:
    settings = tyro.cli(Shuffle, description=__doc__)
    random = np.random.default_rng(settings.seed)
    head = ("order", "classes in a batch", "of the commonest", "spread of batch means", "rank correlation", "met again")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = {"full permutation": [random.permutation(settings.samples) for _ in range(2)]}
    for run_samples, window_runs in ((64, 16), (16, 64), (64, 64), (256, 16)):
        epochs = [epoch_of(settings, epoch, run_samples, window_runs) for epoch in range(2)]
        assert all(np.array_equal(np.sort(epoch), np.arange(settings.samples)) for epoch in epochs)
        rows[f"runs of {run_samples}, {window_runs} a window"] = epochs
    lines += [f"| {name} | {' | '.join(figures(*epochs))} |" for name, epochs in rows.items()]
    about = (__doc__ or "").split("\n\n")[2].strip()
    legend = (
        f"{settings.samples} samples. *Spread of batch means*: standard deviation of the batches' mean class, in units "
        "of what independent draws have. *Rank correlation* of a sample's number and its place in the epoch. *Met "
        "again*: how often samples that stood side by side are in one batch of the next epoch too, in units of chance."
    )
    write_result("shuffle", f"{about}\n\n{legend}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
