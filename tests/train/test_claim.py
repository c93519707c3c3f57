"""One driver a run: the second is refused, whether it came later or at once; a dead one's claim counts no more."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mqwen import cli
from mqwen.storage import Location, locate
from mqwen.train import claim
from mqwen.train.claim import Driver, RunInUseError, claimed

HOLD = """
import sys, time
from mqwen.storage import locate
from mqwen.train.claim import claimed
with claimed(locate(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(params=["folder", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return request.getfixturevalue("bucket") / "run" if request.param == "s3" else locate(tmp_path / "run")


def drivers(run: Location) -> list[str]:
    return [name for name in run.names() if name.startswith(claim.PREFIX)]


def test_the_second_is_refused_and_the_first_goes_on(run: Location) -> None:
    with claimed(run):
        held = drivers(run)
        message = f"run {run} is being trained by process {os.getpid()} on .*: wait for it or end it, or give another"
        with pytest.raises(RunInUseError, match=message), claimed(run):
            pass
        assert drivers(run) == held
    assert drivers(run) == []
    with claimed(run):
        pass


def test_a_killed_driver_is_known_to_be_gone(tmp_path: Path) -> None:
    run = locate(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunInUseError, match=f"process {process.pid} "), claimed(run):
            pass
        process.kill()
        process.wait()
        started = time.monotonic()
        with claimed(run):
            assert time.monotonic() - started < claim.LEASE / 2
            assert len(drivers(run)) == 1


@pytest.fixture
def elsewhere(run: Location) -> Callable[[int], None]:
    """Writes the claim of a driver on another machine, with its count of beats."""
    driver = replace(Driver.this(), host="elsewhere")

    def beat(number: int) -> None:
        (run / f"{claim.PREFIX}other.json").write_bytes(json.dumps(asdict(replace(driver, beat=number))).encode())

    beat(0)
    return beat


def test_another_machine_that_is_silent_has_lost_the_run(
    run: Location, elsewhere: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "LEASE", 1.0)
    with claimed(run):
        assert f"{claim.PREFIX}other.json" not in drivers(run)


def test_another_machine_whose_heart_beats_keeps_it(run: Location, elsewhere: Callable[[int], None]) -> None:
    beats = threading.Timer(0.3, elsewhere, [1])
    beats.start()
    with pytest.raises(RunInUseError, match="on elsewhere:"), claimed(run):
        pass
    beats.join()
    assert drivers(run) == [f"{claim.PREFIX}other.json"]


@pytest.mark.parametrize("said", ["was taken over by another driver", "lost its folder"])
def test_who_has_lost_the_run_stops(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As after a machine slept: others took the run over. Or somebody deleted it."""
    monkeypatch.setattr(claim, "BEAT", 0.05)
    run = locate(tmp_path / "run")

    def lose() -> None:
        with claimed(run):
            (name,) = drivers(run)
            if "another" in said:
                (run / f"{claim.PREFIX}other.json").write_bytes((run / name).read_bytes())
            (run / name).delete()
            threading.Event().wait(5)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(lose)  # as every job runs
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 143
    assert f"run {run} {said}: this one stops" in capsys.readouterr().err


def test_who_holds_a_run(run: Location) -> None:
    with claimed(run):
        (found,) = claim.drivers(run)
        assert found.here
        assert found.pid == os.getpid()
        ended, elsewhere = replace(found, started=1.0), replace(found, host="another")
        for number, one in enumerate((ended, elsewhere)):
            (run / f"{claim.PREFIX}{number}.json").write_bytes(json.dumps(asdict(one)).encode())
        assert {one.host for one in claim.drivers(run)} == {found.host, "another"}
        assert len(claim.drivers(run)) == 2
