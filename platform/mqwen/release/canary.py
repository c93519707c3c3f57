"""The candidate beside the one that answers clients now: both are asked the same questions over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from statistics import median

from rich.table import Table

from mqwen.data.dataset import Dataset
from mqwen.data.order import Place
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample
from mqwen.evaluate.metrics import exact_match
from mqwen.model.chat import text_of
from mqwen.release.client import Chat, Reply, Server, ask
from mqwen.release.errors import ReleaseError
from mqwen.storage import Location

LIVE_FAILURES = 0.05  # most of the questions that the live model may leave open: the rest are too few to compare


@dataclass(frozen=True)
class Canary:
    """`questions` of the set are asked, drawn by `seed`. The candidate must answer all of them, and at most a share
    `allowed_drop` of those that the live model answers too less often right than it."""

    questions: int = 100
    allowed_drop: float = 0.0
    max_tokens: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raises ReleaseError for numbers out of range."""
        for option, value, least, most in (
            ("questions", self.questions, 1, 100_000),
            ("allowed-drop", self.allowed_drop, 0, 1),
            ("max-tokens", self.max_tokens, 1, 100_000),
        ):
            if not least <= value <= most:
                raise ReleaseError(f"--canary.{option} is {value}; {least} to {most} is allowed")


@dataclass(frozen=True)
class Answers:
    """One server's replies to the canary's questions, and which of them are right."""

    replies: list[Reply]
    marks: list[bool]

    @property
    def right(self) -> int:
        return sum(self.marks)

    @property
    def failed(self) -> int:
        return sum(bool(reply.error) for reply in self.replies)

    @property
    def median_seconds(self) -> float:
        return median([reply.seconds for reply in self.replies if not reply.error] or [0.0])


@dataclass(frozen=True)
class Comparison:
    """`live` is None where nothing answers clients yet."""

    samples: list[Sample]
    candidate: Answers
    live: Answers | None

    def check(self, canary: Canary) -> None:
        """Raises ReleaseError where the candidate must not become the live one."""
        if self.candidate.failed:
            first = next(reply.error for reply in self.candidate.replies if reply.error)
            raise ReleaseError(
                f"{self.candidate.failed} of {len(self.samples)} canary questions got no answer, the first: {first}"
            )
        if not self.live:
            return
        if self.live.failed > LIVE_FAILURES * len(self.samples):
            first = next(reply.error for reply in self.live.replies if reply.error)
            raise ReleaseError(
                f"the live model left {self.live.failed} of {len(self.samples)} canary questions without an answer, so "
                f"there is too little to compare with; release when it is well, the first: {first}"
            )
        both = [at for at, reply in enumerate(self.live.replies) if not reply.error]
        candidate, live = (sum(answers.marks[at] for at in both) for answers in (self.candidate, self.live))
        if live - candidate > canary.allowed_drop * len(both):
            raise ReleaseError(
                f"of {len(both)} canary questions the candidate answers {candidate} right, the live model {live}; "
                f"--canary.allowed-drop {canary.allowed_drop} allows no such drop"
            )

    def table(self) -> Table:
        table = Table("", "questions", "right", "no answer", "median seconds")
        for name, answers in (("candidate", self.candidate), ("live", self.live)):
            if answers:
                figures = len(self.samples), answers.right, answers.failed, f"{answers.median_seconds:.3f}"
                table.add_row(name, *map(str, figures))
        return table

    def write(self, file: Location) -> None:
        """One JSON line a question, with both answers."""
        lives = self.live.replies if self.live else [None] * len(self.samples)
        lines = [
            {"key": sample.key, "expected": text_of(sample.messages[-1]), "candidate": asdict(candidate)}
            | ({"live": asdict(live)} if live else {})
            for sample, candidate, live in zip(self.samples, self.candidate.replies, lives, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.write_bytes(text.encode("utf-8", "backslashreplace"))


def draw(canary: Canary, dataset: Dataset, places: Sequence[Place]) -> list[Sample]:
    """The samples that are asked, by the dataset's keys. Raises ReleaseError where none can be read."""
    drawn = Random(canary.seed).sample(list(places), min(canary.questions, len(places)))
    drawn = [replace(place, run=number) for number, place in enumerate(drawn)]  # they lie far apart: each a read
    reader = Samples([dataset], drawn)
    found = ((place.key, reader.read(place)) for place in drawn)
    samples = [replace(sample, key=key) for key, sample in found if isinstance(sample, Sample)]
    if not samples:
        raise ReleaseError(
            f"none of the {len(drawn)} samples drawn from {dataset.location} can be read; name another canary set"
        )
    return samples


def compare(
    canary: Canary,
    dataset: Dataset,
    places: Sequence[Place],
    candidate: Server,
    live: Server | None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Asks both each question. Raises ReleaseError where the set has no readable sample."""
    samples = draw(canary, dataset, places)
    chats = [Chat(sample.messages[:-1], sample.pictures) for sample in samples]

    def answers(server: Server) -> Answers:
        replies = ask(server, chats, canary.max_tokens, progress)
        expected = [text_of(sample.messages[-1]) for sample in samples]
        right = [
            not reply.error and exact_match(reply.text, text) for reply, text in zip(replies, expected, strict=True)
        ]
        return Answers(replies, right)

    return Comparison(samples, answers(candidate), answers(live) if live else None)
