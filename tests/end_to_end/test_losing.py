"""Three nodes that train and serve lose one, and then their head."""

from pathlib import Path

import pytest

from tests.end_to_end.losing import lose_all

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def test_what_three_nodes_lose_comes_back(moto: str, tokenizer: Path, tmp_path: Path) -> None:
    """That all comes back within the limits of `losing.until` is already seen when the figures are there."""
    found = lose_all(moto, tokenizer, tmp_path)
    for when in ("node lost", "head away", "head lost"):
        assert found[f"{when}: answers"] > 10
        assert found[f"{when}: longest time without an answer, s"] < 30
