"""A small dataset, and processes that train together over gloo."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.train.settings import RunSettings
from tests.data.making import WORDS, random_sample, write_dataset
from tests.train.making import SEEDS, SIDE, tiny_settings

LIMIT = 120  # seconds that ranks may wait for one another, or a test for them


class Ranks:
    """Four processes, started when first wanted; any number of them makes a process group for one function."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._groups = folder, 0
        spawn = get_context("spawn")
        self._processes = [ProcessPoolExecutor(1, spawn) for _ in range(4)]

    def run(self, workers: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(rank, workers, *arguments)` returns on each rank. Raises what a rank raises."""
        self._groups += 1
        meeting = self._folder / str(self._groups)
        waiting = [
            self._processes[rank].submit(in_group, rank, workers, meeting, work, arguments) for rank in range(workers)
        ]
        return [one.result(LIMIT) for one in waiting]

    def end(self) -> None:
        for process in self._processes:
            process.shutdown(cancel_futures=True)


def in_group(rank: int, workers: int, meeting: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    join_group(rank, workers, meeting)
    try:
        return work(rank, workers, *arguments)
    finally:
        dist.destroy_process_group()


def join_group(rank: int, workers: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers, timeout=limit)


class Pair:
    """Two processes in one process group for all they do: DeepSpeed keeps the first one it meets."""

    def __init__(self, folder: Path) -> None:
        spawn = get_context("spawn")
        self._processes = [
            ProcessPoolExecutor(1, spawn, join_group, (rank, 2, folder / "meeting")) for rank in range(2)
        ]

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(rank, 2, *arguments)` returns on each rank. Raises what a rank raises."""
        waiting = [process.submit(work, rank, 2, *arguments) for rank, process in enumerate(self._processes)]
        return [one.result(LIMIT) for one in waiting]

    def end(self) -> None:
        for process in self._processes:
            process.shutdown(cancel_futures=True)


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.end()


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.end()


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary([" ".join(WORDS)], 300, folder / VOCABULARY_FILE)
    return folder


@pytest.fixture(scope="package")
def dataset(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    processor = MQWenProcessor(MQWenTokenizer.from_pretrained(tokenizer), image_size=SIDE)
    write_dataset(folder, processor, [*map(random_sample, SEEDS)])
    return folder


@pytest.fixture
def settings(tokenizer: Path, dataset: Path, tmp_path: Path) -> RunSettings:
    return tiny_settings(tokenizer, dataset, tmp_path)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
