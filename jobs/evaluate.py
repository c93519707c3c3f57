"""Evaluate: an artifact answers a held-out dataset's questions, in batches on Ray Data.

python jobs/evaluate.py --artifact out/artifact --dataset out/heldout --out out/evaluation
"""

from dataclasses import dataclass, field

import tyro
from rich.console import Console
from rich.table import Table

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.evaluate.answerer import Generation
from mqwen.evaluate.evaluation import Actors, Evaluation, write_report
from mqwen.storage import readable, writable


@dataclass(frozen=True)
class Evaluate:
    """`artifact` is a URI, `dataset` that of one that jobs/ingest.py wrote, `out` that of the folder to write to.

    Each sample's last answer is asked from the turns before it.
    """

    artifact: str
    dataset: str
    out: str = "out/evaluation"
    generation: Generation = field(default_factory=Generation)
    actors: Actors = field(default_factory=Actors)


def main() -> None:
    command = tyro.cli(Evaluate, description=__doc__)
    artifact, dataset, out = readable(command.artifact), readable(command.dataset), writable(command.out)
    evaluation = Evaluation.prepare(artifact, dataset, command.generation, command.actors)
    with cluster(cpus=command.actors.count * command.actors.cpus + 1):
        answers = evaluation.run(cli.counter("answers"))
    found = write_report(out, evaluation, answers)
    for answer in [answer for answer in answers if answer.error][:10]:
        print(f"left out: {answer.key}: {answer.error}")
    table = Table("samples", "left out", "exact match", "CIDEr-D", "loss per answer token")
    table.add_row(
        f"{found['samples']}",
        f"{found['left_out']}",
        f"{found['exact_match']:.1%}",
        f"{found['cider_d']:.3f}",
        f"{found['loss']:.4f}",
    )
    Console().print(table)
    print(f"{out / 'report.json'}, {out / 'answers.jsonl'}")


if __name__ == "__main__":
    cli.run(main)
