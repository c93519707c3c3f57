import pytest


@pytest.fixture(autouse=True)
def nothing_inherited(no_aws: None) -> None:
    """These tests know no AWS settings but their own."""
