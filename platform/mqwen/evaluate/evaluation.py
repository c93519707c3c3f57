"""An evaluation: a held-out dataset's questions, answered by actors, scored, written down.

OUT/report.json      the scores, and what they were made of
OUT/answers.jsonl    one line a sample, by key
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import ray.data

from mqwen.data.dataset import Dataset, open_dataset
from mqwen.data.errors import DataError
from mqwen.data.manifest import read_index
from mqwen.data.order import Place
from mqwen.errors import UserError
from mqwen.evaluate.answerer import Answer, Answerer, Generation
from mqwen.evaluate.metrics import cider_d
from mqwen.model.artifact import open_artifact
from mqwen.resources import require
from mqwen.storage import Location, local_folder

BATCH = 32  # samples that an actor is asked at once
WAIT = 10.0  # seconds for others to end, where the cluster has no room for the actors


class EvaluationError(UserError):
    """An evaluation that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Actors:
    """How many hold the model, and what Ray sets aside for each. `gpus` 1 puts each on a GPU of its own."""

    count: int = 1
    cpus: int = 1
    gpus: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which artifact. Made with `prepare`, which refuses what can be before an actor starts."""

    artifact: Location
    dataset: Dataset
    places: list[Place]
    generation: Generation = field(default_factory=Generation)
    actors: Actors = field(default_factory=Actors)

    @classmethod
    def prepare(cls, artifact: Location, dataset: Location, generation: Generation, actors: Actors) -> Evaluation:
        """Raises UserError for settings out of range, a broken artifact, a dataset that is none, empty, or ingested
        with another tokenizer."""
        for option, value, least in (
            ("generation.max-tokens", generation.max_tokens, 1),
            ("generation.temperature", generation.temperature, 0),
            ("actors.count", actors.count, 1),
            ("actors.cpus", actors.cpus, 1),
            ("actors.gpus", actors.gpus, 0),
        ):
            if value < least:
                raise EvaluationError(f"--{option} is {value}; at least {least} is needed")
        _, processor = open_artifact(local_folder(artifact))
        opened = open_dataset(dataset)
        opened.check_tokenizer(processor.tokenizer.fingerprint)
        # As they lie: of those that are asked together, a shard's are one read.
        places = [
            Place(shard=shard, run=number, **row)
            for number, shard in enumerate(opened.manifest.shards)
            for row in read_index(dataset, shard).to_pylist()
        ]
        return cls(artifact, opened, places, generation, actors)

    def batches(self) -> list[list[Place]]:
        """What actors are asked at once; the same for any number of them."""
        return [self.places[at : at + BATCH] for at in range(0, len(self.places), BATCH)]

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Answer]:
        """Every sample's answer, by key; `progress(answered, of)` is called after each batch. Needs a Ray cluster.

        Raises as `asked`.
        """
        answers: list[Answer] = []
        for row in self.asked(Answerer, [{"places": pickle.dumps(batch)} for batch in self.batches()]):
            answers += pickle.loads(row["answers"])  # noqa: S301 (ours)
            progress(len(answers), len(self.places))
        return sorted(answers, key=lambda answer: answer.key)

    def asked(self, actor: type, items: list[dict[str, Any]], *more: Any) -> Iterator[dict[str, Any]]:
        """What actors make of each of these, as they come; an actor is made of the evaluation's parts and `more`.

        Which samples are asked together does not depend on the actors. Raises ResourcesError where the cluster has no
        room for them, and UserError where storage fails.
        """
        count = min(self.actors.count, len(items))
        bundle = {"CPU": float(self.actors.cpus)} | ({"GPU": float(self.actors.gpus)} if self.actors.gpus else {})
        way_out = "Ask for less with --actors.count, --actors.cpus or --actors.gpus"
        require(bundle, count, WAIT, "actors", way_out, "a small model can be evaluated without, with --actors.gpus 0")
        ray.data.DataContext.get_current().enable_progress_bars = False
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            actor,
            fn_constructor_args=(self.artifact, self.dataset, self.generation, self.actors.gpus > 0, *more),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=self.actors.cpus,
            num_gpus=self.actors.gpus,
        )
        for row in found.iter_rows():
            if row["failed"]:
                raise EvaluationError(row["failed"])
            yield row


def scores(answers: list[Answer]) -> dict[str, float]:
    """Of those that were not left out: their number, the share of exact matches, CIDEr-D (0 to 10), the mean loss of
    an answer's token. Raises DataError where all were left out."""
    asked = [answer for answer in answers if not answer.error]
    if not asked:
        raise DataError(
            f"none of {len(answers)} samples could be asked; the first, {answers[0].key}: {answers[0].error}"
        )
    cider = cider_d([answer.answer for answer in asked], [[answer.expected] for answer in asked])
    tokens = sum(answer.tokens for answer in asked)
    return {
        "samples": len(asked),
        "left_out": len(answers) - len(asked),
        "exact_match": sum(answer.right for answer in asked) / len(asked),
        "cider_d": sum(cider) / len(asked),
        "loss": sum(answer.loss for answer in asked) / tokens,
        "answer_tokens": tokens,
    }


def write_report(out: Location, evaluation: Evaluation, answers: list[Answer]) -> dict[str, float]:
    """Writes both files and returns the scores."""
    found = scores(answers)
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    (out / "answers.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace"))
    report: dict[str, Any] = {"artifact": str(evaluation.artifact), "dataset": str(evaluation.dataset.location)}
    report |= {"generation": asdict(evaluation.generation), "scores": found}
    (out / "report.json").write_bytes(json.dumps(report, indent=1).encode())
    return found
