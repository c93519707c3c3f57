"""jobs/trace.py against the rows that the steps trained on."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mqwen.data.batch import Batch
from mqwen.data.trace import trace
from mqwen.storage import Location, locate
from mqwen.train.build import starting_point
from mqwen.train.loop import Progress
from mqwen.train.run import open_run
from mqwen.train.settings import RunSettings, SettingsError
from mqwen.training import reader_of
from tests.train.making import rows_from

ROOT = Path(__file__).parents[2]


STEPS = 40


@pytest.fixture
def steps(settings: RunSettings) -> list[list[Batch]]:
    """Of each step the rows. The last one is short, as at the end of a budget of epochs."""
    per_step = settings.data.rows_per_step
    rows = list(itertools.islice(rows_from(settings, Progress()), STEPS * per_step - 3))
    return [rows[at : at + per_step] for at in range(0, len(rows), per_step)]


@pytest.fixture
def run(settings: RunSettings, steps: list[list[Batch]]) -> Iterator[Location]:
    """One that has told of its steps in files of seven."""
    with open_run(replace(settings, steps=2 * STEPS), *starting_point(settings)) as run:
        for first in range(0, STEPS, 7):
            records = [{"step": first + n + 1, "place": rows[-1].place} for n, rows in enumerate(steps[first:][:7])]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (run / "metrics" / f"step-{first + 1:08d}.jsonl").write_bytes(lines.encode())
        yield run


@pytest.mark.parametrize("step", [1, 7, 8, 12, STEPS])
def test_a_step_is_traced(steps: list[list[Batch]], run: Location, step: int) -> None:
    found, trained = list(trace(*reader_of(run, step))), steps[step - 1]
    assert [one.key for one in found if not one.reason] == [key for row in trained for key in row.keys]
    told = {key: why for row in trained for key, why in row.quarantined.items()}
    assert {one.key: one.reason for one in found if one.reason} == told
    assert {one.place for one in found} <= {row.place for row in trained}
    good = [one for one in found if not one.reason]
    assert sum(one.images for one in good) == sum(row.images for row in trained)
    assert all(one.source == f"made/{int(one.key[-4:])}" for one in good)
    segments = sum(int((row.inputs["segment_ids"] > 0).sum()) for row in trained)
    assert sum(one.tokens for one in good) == segments - sum(one.pack >= 0 for one in found if one.reason)


@pytest.mark.parametrize("step", [0, STEPS + 1])
def test_steps_that_are_none(run: Location, step: int) -> None:
    """A step that was planned and not trained is none."""
    with pytest.raises(SettingsError, match=f"step {step} is none of .*, whose metrics tell of the steps 1 to {STEPS}"):
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
