"""A processor of a small vocabulary and small pictures, and a Ray for the modules that need one."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.data.making import WORDS
from tests.scraping import FAST


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vocabulary file."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary([" ".join(WORDS)], 300, folder / VOCABULARY_FILE)
    return folder


@pytest.fixture(scope="session")
def processor(vocabulary: Path) -> MQWenProcessor:
    return MQWenProcessor(MQWenTokenizer(vocabulary / VOCABULARY_FILE), image_size=16)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two logical CPUs on loopback, for one module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in FAST.items():
            patch.setenv(name, value)
        import ray

        folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie in it
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            # Ray ends the process, without a word, if a thread that reads a dataset calls it after this.
            for thread in threading.enumerate():
                if thread.name == "iter_threaded":
                    thread.join(60)
                    assert not thread.is_alive()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
