from collections.abc import Iterator

import pytest

from infra.cluster import PROMETHEUS
from tests.infra.operators import Up, started


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    if not PROMETHEUS.exists():
        pytest.skip("`make prometheus` brings it")
    with started(tmp_path_factory.mktemp("operators") / "cluster") as found:
        yield found
