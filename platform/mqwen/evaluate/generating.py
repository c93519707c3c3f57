"""A whole dataset's answers as Parquet, in parts that are there whole or not at all, so that a stop costs no row twice.

OUT/generation.json      what is generated, by what
OUT/part-000000.parquet  key, question, expected, answer, error; each part is one batch
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mqwen.data.dataset import Dataset
from mqwen.data.manifest import MANIFEST
from mqwen.errors import UserError
from mqwen.evaluate.answerer import Answer, Answerer, Generation
from mqwen.evaluate.evaluation import BATCH, Evaluation, EvaluationError
from mqwen.storage import Location

PLAN = "generation.json"
COLUMNS = ("key", "question", "expected", "answer", "error")


class Generator:
    """What each actor does: it answers a batch and writes its part."""

    def __init__(self, artifact: Location, dataset: Dataset, generation: Generation, gpu: bool, out: Location) -> None:
        self._answerer, self._out = Answerer(artifact, dataset, generation, gpu, losses=False), out

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Ray Data's: a row with a batch's number and its pickled places to one that says what became of it."""
        (row,) = batch.to_pylist()
        left_out, failed = 0, ""
        try:
            answers = self._answerer.answer(pickle.loads(row["places"]))  # noqa: S301 (ours)
            self.write(row["number"], answers)
            left_out = sum(bool(answer.error) for answer in answers)
        except UserError as error:  # raised, it would reach the driver with a trace for text
            failed = str(error)
        return pa.table({"rows": [len(answers) if not failed else 0], "left_out": [left_out], "failed": [failed]})

    def write(self, number: int, answers: list[Answer]) -> None:
        """Text that no UTF-8 has (half a surrogate pair) is escaped."""
        columns = {
            name: [getattr(one, name).encode("utf-8", "backslashreplace").decode() for one in answers]
            for name in COLUMNS
        }
        written = io.BytesIO()
        pq.write_table(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in COLUMNS])), written)
        (self._out / part(number)).write_bytes(written.getvalue())


def part(number: int) -> str:
    return f"part-{number:06}.parquet"


def generate(
    evaluation: Evaluation, out: Location, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes the parts that are not there yet, and returns how many samples were left out of these.

    `progress(rows, of)` counts those of earlier starts too. Needs a Ray cluster. Raises UserError where `out` holds
    something else, the cluster has no room for the actors, or storage fails.
    """
    _claim(evaluation, out)
    batches, there = evaluation.batches(), set(out.names())
    todo: list[dict[str, Any]] = [
        {"number": number, "places": pickle.dumps(batch)}
        for number, batch in enumerate(batches)
        if part(number) not in there
    ]
    total = len(evaluation.places)
    done = total - sum(len(batches[item["number"]]) for item in todo)
    progress(done, total)
    if not todo:
        return 0
    left_out = 0
    for row in evaluation.asked(Generator, todo, out):
        done, left_out = done + row["rows"], left_out + row["left_out"]
        progress(done, total)
    return left_out


def _claim(evaluation: Evaluation, out: Location) -> None:
    """Raises EvaluationError where `out` holds the parts of another generation."""
    plan = _plan(evaluation)
    if (out / PLAN).exists():
        begun = json.loads((out / PLAN).read_bytes())
        changed = [name for name in plan if begun.get(name) != plan[name]]
        if changed:
            raise EvaluationError(
                f"--out {out} was begun with another {' and another '.join(changed)}; give another --out, or delete it"
            )
    else:
        (out / PLAN).write_bytes(json.dumps(plan, indent=1).encode())


def _plan(evaluation: Evaluation) -> dict[str, Any]:
    files = sorted(name for name in evaluation.artifact.names() if name.endswith(".safetensors"))
    return {
        "artifact": {name: (evaluation.artifact / name).sha256() for name in files},
        "dataset": (evaluation.dataset.location / MANIFEST).sha256(),
        "generation": asdict(evaluation.generation),
        "batch": BATCH,
    }
