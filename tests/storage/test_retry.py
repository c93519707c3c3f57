"""What fails for a while is tried again, what stays so is not."""

import time
from collections.abc import Callable

import pytest

from mqwen.storage import MissingFileError, StorageError, retried


def failing(times: int, error: Exception) -> Callable[[], str]:
    """Something that works after so many times."""
    left = [error] * times

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    return work


def test_what_fails_for_a_while_is_tried_again(capsys: pytest.CaptureFixture) -> None:
    assert retried(failing(1, StorageError("s3://bucket/a cannot be read"))) == "done"
    assert capsys.readouterr().out == "s3://bucket/a cannot be read; trying again in 1 s\n"


def test_until_the_time_is_up(capsys: pytest.CaptureFixture) -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot be read"):
        retried(failing(9, StorageError("s3://bucket/a cannot be read")), until=started + 2)
    assert 1 <= time.monotonic() - started < 4  # a pause of one second, and none of two
    assert capsys.readouterr().out.count("trying again") == 1


def test_what_is_not_there_is_not_waited_for(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(MissingFileError):
        retried(failing(1, MissingFileError("s3://bucket/a does not exist or is no file")))
    assert capsys.readouterr().out == ""
