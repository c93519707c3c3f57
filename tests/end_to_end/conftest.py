from collections.abc import Iterator
from pathlib import Path

import pytest

from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.end_to_end.commands import Shell, shell


@pytest.fixture(scope="module")
def alone() -> Iterator[Shell]:
    """A shell without a cluster: commands that need one start their own."""
    with shell() as found:
        yield found


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(vocabulary_texts(), 400, folder / VOCABULARY_FILE)
    return folder
