"""How full packs are, beside offline best-fit-decreasing over the whole set.

python -m tests.benchmarks.packing [--samples 200000]

The lengths are drawn from a distribution that is written down here: three in ten samples are text alone (log-normal,
median 180 tokens, sigma 1), six have one picture with a short conversation (median 70, sigma 0.8), one has two to four
pictures (median 120, sigma 0.8). A picture takes 256 positions. What is longer than a pack is left out of both.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import tyro

from mqwen.data.dataset import Dataset
from mqwen.data.manifest import INDEX_SCHEMA, Manifest, Shard, Shards
from mqwen.data.order import Order, OrderSettings
from mqwen.data.pack import pack
from mqwen.storage import locate
from tests.benchmarks.result import write_result

IMAGE_POSITIONS = 256
SHARD = 2048


@dataclass(frozen=True)
class Packing:
    samples: int = 200_000
    seed: int = 0


def draw(settings: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, with one placeholder a picture, and pictures of each sample."""
    random = np.random.default_rng(settings.seed)
    kind = random.choice(3, settings.samples, p=(0.3, 0.6, 0.1))
    images = np.choose(kind, (np.zeros_like(kind), np.ones_like(kind), random.integers(2, 5, settings.samples)))
    median, sigma = np.choose(kind, (180, 70, 120)), np.choose(kind, (1.0, 0.8, 0.8))
    text = np.exp(np.log(median) + sigma * random.standard_normal(settings.samples))
    return np.maximum(text, 8).astype(int) + images, images


def main() -> None:
    settings = tyro.cli(Packing, description=__doc__)
    tokens, images = draw(settings)
    starts = range(0, settings.samples, SHARD)
    shards = [Shard(f"{n}", "", min(SHARD, settings.samples - n), 0, 0, 0, "", "") for n in starts]
    place = locate("/none")
    dataset = Dataset(place, Manifest(Shards(map(asdict, shards)), "", {}), place)

    def index_of(shard: Shard) -> pa.Table:
        rows = slice(int(shard.name), int(shard.name) + shard.samples)
        columns = {"key": [""] * shard.samples, "offset": [0] * shard.samples, "nbytes": [0] * shard.samples}
        columns |= {"tokens": tokens[rows], "images": images[rows], "sha256": [""] * shard.samples}
        return pa.table(columns, schema=INDEX_SCHEMA)

    indexes = {shard.name: index_of(shard) for shard in shards}

    def index(_: Dataset, shard: Shard) -> pa.Table:
        return indexes[shard.name]

    head = ("pack length", "packs a row", "samples a window", "ours full", "whole set full", "points apart")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for length in (2048, 8192):
        sizes = OrderSettings(0, length, 1, IMAGE_POSITIONS).positions(tokens, images)
        used = int(sizes[sizes <= length].sum())
        whole = used / (len(pack(sizes.tolist(), length)[0]) * length)
        for per_row, runs in ((1, 16), (4, 16), (1, 64), (4, 64)):
            order = Order([dataset], OrderSettings(settings.seed, length, per_row, IMAGE_POSITIONS, window_runs=runs))
            rows = sum(len(order.plan(0, window, index).rows) for window in range(order.windows))
            ours = used / (rows * per_row * length)
            apart = (whole - ours) * 100
            lines.append(f"| {length} | {per_row} | {runs * 64} | {ours:.2%} | {whole:.2%} | {apart:.2f} |")
    about = (__doc__ or "").split("\n\n")[2].strip()
    write_result("packing", f"{about}\n\n{settings.samples} samples.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
