"""A dataset's answers as Parquet: the same after a stop, no row twice, nothing mixed."""

import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mqwen.evaluate.answerer import Answerer, Generation
from mqwen.evaluate.evaluation import Actors, Evaluation, EvaluationError
from mqwen.evaluate.generating import PLAN, Generator, _claim, part
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, locate
from tests.data.making import random_sample, write_dataset
from tests.end_to_end.commands import Shell, shell
from tests.engine.tiny import build_artifact

GENERATION = Generation(max_tokens=8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_artifact(tmp_path_factory.mktemp("artifact") / "tiny", layers=2)


@pytest.fixture(scope="module")
def dataset(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Location:
    samples = [random_sample(seed) for seed in range(70)]
    return write_dataset(tmp_path_factory.mktemp("dataset"), MQWenProcessor.from_pretrained(artifact), samples, 20)


def test_a_part_holds_what_the_model_answers(artifact: Path, dataset: Location, tmp_path: Path) -> None:
    evaluation = Evaluation.prepare(locate(artifact), dataset, GENERATION, Actors())
    places = evaluation.batches()[-1]
    expected = Answerer(locate(artifact), evaluation.dataset, GENERATION, gpu=False).answer(places)
    generator = Generator(locate(artifact), evaluation.dataset, GENERATION, False, locate(tmp_path))
    generator.write(2, generator._answerer.answer(places))
    rows = pq.read_table(tmp_path / part(2)).to_pylist()
    assert [row["key"] for row in rows] == [place.key for place in places]
    assert [(row["question"], row["expected"], row["answer"]) for row in rows] == [
        (one.question, one.expected, one.answer) for one in expected
    ]


def test_a_folder_of_other_answers_is_refused(artifact: Path, dataset: Location, tmp_path: Path) -> None:
    def claim(generation: Generation) -> None:
        _claim(Evaluation.prepare(locate(artifact), dataset, generation, Actors()), locate(tmp_path))

    claim(GENERATION)
    claim(GENERATION)
    with pytest.raises(EvaluationError, match="was begun with another generation; give another --out"):
        claim(Generation(max_tokens=9))
    assert (tmp_path / PLAN).exists()


@pytest.mark.soak
def test_a_command_that_was_killed_goes_on(artifact: Path, dataset: Location, tmp_path: Path) -> None:
    def words(out: str) -> list[object]:
        return ["jobs/generate.py", "--artifact", artifact, "--dataset", dataset, "--out", tmp_path / out]

    def rows(out: str) -> list[dict[str, str]]:
        return [row for file in sorted((tmp_path / out).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]

    def begin(shell: Shell) -> subprocess.Popen[str]:
        return shell.start(*words("stopped"), "--generation.max-tokens", 64)

    with shell() as one:
        one.done(*words("whole"), "--generation.max-tokens", 64)
        process = begin(one)
        deadline = time.monotonic() + 120
        while not (tmp_path / "stopped" / part(0)).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "stopped").glob("*.parquet")}
    assert 1 <= len(there) < 3
    with shell() as other:
        output = other.done(*words("stopped"), "--generation.max-tokens", 64)
        assert "70 rows" in output
        again = other.done(*words("stopped"), "--generation.max-tokens", 64)
        assert "rows: 70/70" in again
    assert {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in there} == there
    assert rows("stopped") == rows("whole")
    assert len(rows("whole")) == len({row["key"] for row in rows("whole")}) == 70
