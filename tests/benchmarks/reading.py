"""Data sets and measures that the benchmarks of reading share."""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from mqwen.data.sample import Sample
from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import Location
from tests.data.making import WORDS, write_dataset


def make_processor(folder: Path, side: int) -> MQWenProcessor:
    folder.mkdir(exist_ok=True)
    train_vocabulary([" ".join(WORDS)], 300, folder / VOCABULARY_FILE)
    return MQWenProcessor(MQWenTokenizer(folder / VOCABULARY_FILE), image_size=side)


def photo(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG of about 60 kB with the spectrum of a photograph: noise of every scale, the coarser the stronger."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells in (3, 8, 24, 80, 240):
        noise = random.normal(0, 160 / cells**0.6, (cells * height // width + 1, cells, 3))
        layer = Image.fromarray((noise.clip(-127, 127) + 128).astype(np.uint8)).resize((width, height))
        pixels += np.asarray(layer, np.float64) - 128
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def make_photos(folder: Path, processor: MQWenProcessor, count: int, different: int = 64) -> Location:
    """Samples of one photograph and a short conversation, in shards of 256."""
    photos = [photo(seed) for seed in range(different)]
    samples = []
    for n in range(count):
        words = " ".join(WORDS[(n + i) % len(WORDS)] for i in range(12))
        asked = [{"type": "image"}, {"type": "text", "text": words}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{words} {n}"}]
        samples.append(Sample(f"{n:06d}", turns, [photos[n % different]]))
    return write_dataset(folder, processor, samples, 256)


def make_texts(folder: Path, processor: MQWenProcessor, count: int) -> Location:
    """Samples of a few words, without pictures."""
    answers = [{"role": "assistant", "content": f"{n}"} for n in range(count)]
    turns = [[{"role": "user", "content": WORDS[n % 9]}, answer] for n, answer in enumerate(answers)]
    return write_dataset(folder, processor, [Sample(f"{n:06d}", turn) for n, turn in enumerate(turns)], 2048)


def steady(start: Callable[[], Iterable[int]], skipped: int, taken: int) -> tuple[float, float]:
    """Seconds to the first batch, and samples a second afterwards: `start()` gives the number of each batch's samples,
    of which the first `skipped` and then `taken` ones are drawn."""
    began = time.perf_counter()
    with closing(iter_of(start)) as batches:
        count = next(batches)
        first = time.perf_counter() - began
        while count < skipped:
            count += next(batches)
        began, count = time.perf_counter(), 0
        while count < taken:
            count += next(batches)
        return first, count / (time.perf_counter() - began)


def iter_of(start: Callable[[], Iterable[int]]) -> Iterator[int]:
    yield from start()
