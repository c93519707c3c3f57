"""jobs/trace.py against the rows that the steps trained on."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mqwen.data.trace import trace
from mqwen.storage import Location, locate
from mqwen.train.build import starting_point
from mqwen.train.loop import Progress
from mqwen.train.run import open_run
from mqwen.train.settings import RunSettings, SettingsError
from mqwen.training import reader_of
from tests.train.making import rows_from

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(settings: RunSettings) -> Iterator[Location]:
    with open_run(replace(settings, steps=40), *starting_point(settings)) as run:
        yield run


def test_a_step_is_traced_from_the_start_or_from_a_position(settings: RunSettings, run: Location) -> None:
    per_step = settings.data.rows_per_step
    rows = list(itertools.islice(rows_from(settings, Progress()), 40 * per_step))
    steps = [rows[at : at + per_step] for at in range(0, len(rows), per_step)]
    for known in (None, 7, 30):
        if known:
            record = {"step": known, "place": steps[known - 1][-1].place}
            (run / "metrics" / f"step-{known:08d}.jsonl").write_bytes(json.dumps(record).encode())
        for step in (1, 7, 8, 12, 31, 40):
            reader, skipped, count = reader_of(run, step)
            assert (reader.start != type(reader.start)()) == (known is not None and step > 7)
            found = list(trace(reader, skipped, count))
            trained = steps[step - 1]
            assert [one.key for one in found if not one.reason] == [key for row in trained for key in row.keys]
            left_out = {one.key: one.reason.partition(":")[0] for one in found if one.reason}
            told = {key: why.partition(":")[0] for row in trained for key, why in row.quarantined.items()}
            assert left_out == told
            assert {one.place for one in found} <= {row.place for row in trained}
            good = [one for one in found if not one.reason]
            assert sum(one.images for one in good) == sum(row.images for row in trained)
            assert all(one.source == f"made/{int(one.key[-4:])}" for one in good)
            segments = sum(int((row.inputs["segment_ids"] > 0).sum()) for row in trained)
            assert sum(one.tokens for one in good) == segments - sum(one.pack >= 0 for one in found if one.reason)


@pytest.mark.parametrize(
    ("step", "message"), [(0, "step 0 is none of .*, whose steps are 1 to 40"), (41, "step 41 is none of")]
)
def test_steps_that_are_none(run: Location, step: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        reader_of(run, step)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is no run: it has no settings\.json"):
        reader_of(locate(tmp_path), 1)


@pytest.mark.soak
def test_the_command(settings: RunSettings, run: Location) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/trace.py", run.path, "2"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    per_step = settings.data.rows_per_step
    for row in itertools.islice(rows_from(settings, Progress()), per_step, 2 * per_step):
        assert all(f" {key} " in done.stdout for key in row.keys)
