"""A release, step by step: exported, evaluated, started beside the live model, compared with it, switched to.

TO/MODEL-RUN-STEP/artifact      what is deployed; it stays as long as the application does
TO/MODEL-RUN-STEP/evaluation    the held-out set's scores and answers
TO/MODEL-RUN-STEP/canary.jsonl  both models' answers to the canary's questions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mqwen.data.manifest import read_manifest
from mqwen.evaluate.answerer import Generation
from mqwen.evaluate.evaluation import Actors, Evaluation, write_report
from mqwen.release.bar import Bar
from mqwen.release.canary import Canary, Comparison, compare
from mqwen.release.client import check
from mqwen.release.service import Service, ServiceSettings
from mqwen.storage import Location, readable, writable
from mqwen.train.export import export, find_checkpoint

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReleaseSettings:
    """`run` is the run's URI, `step` a checkpoint other than the newest, `to` the URI under which the release gets a
    folder. `heldout` is a dataset that training never saw; `canary_set` another one for the canary.
    """

    run: str
    to: str
    heldout: str
    service: ServiceSettings
    bar: Bar = field(default_factory=Bar)
    step: int | None = None
    canary_set: str | None = None
    canary: Canary = field(default_factory=Canary)
    actors: Actors = field(default_factory=Actors)


class Release:
    """Its methods are its steps, in their order; each raises UserError where the release ends."""

    def __init__(self, settings: ReleaseSettings, service: Service) -> None:
        """Refuses what can be before anything is computed."""
        settings.bar.check_given()
        settings.canary.check()
        self._settings, self._service = settings, service
        self._run, self._heldout = readable(settings.run), readable(settings.heldout)
        self._canary_set = readable(settings.canary_set) if settings.canary_set else self._heldout
        for dataset in (self._heldout, self._canary_set):
            read_manifest(dataset)
        self.name = f"{service.model}-{self._run.name}-{find_checkpoint(self._run, settings.step).name}"
        self.folder = writable(settings.to) / self.name
        self._artifact = self.folder / "artifact"
        service.check_free(self.name, str(self._artifact))
        if live := service.live:
            check(service.server(live))
        self._live = live

    def export(self) -> None:
        export(self._run, self._artifact, self._settings.step)

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """The held-out set's scores. Needs a Ray cluster. Raises ReleaseError below the bar."""
        evaluation = self._evaluation(self._heldout)
        scores = write_report(self.folder / "evaluation", evaluation, evaluation.run(progress))
        self._settings.bar.check(scores)
        return scores

    def deploy(self, progress: Progress, show: Callable[[Comparison], None]) -> str:
        """Starts the candidate, compares, switches; `show` is given the comparison. Returns what is live then.

        Needs a Ray cluster, as `evaluate`.
        Whatever ends it before the last step, Ctrl-C too, ends the candidate, and the live model stays the live one.
        """
        settings, service, live = self._settings, self._service, self._live
        canary = self._evaluation(self._canary_set)
        with service.candidate(self.name, str(self._artifact)) as candidate:
            servers = service.server(candidate), service.server(live) if live else None
            found = compare(settings.canary, canary.dataset, canary.places, *servers, progress)
            found.write(self.folder / "canary.jsonl")
            show(found)
            found.check(settings.canary)
            return service.switch(candidate)

    def _evaluation(self, dataset: Location) -> Evaluation:
        generation = Generation(max_tokens=self._settings.canary.max_tokens)
        return Evaluation.prepare(self._artifact, dataset, generation, self._settings.actors)
