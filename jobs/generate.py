"""Generate: an artifact answers a whole dataset's questions, in batches on Ray Data, into Parquet.

python jobs/generate.py --artifact out/artifact --dataset out/data --out out/generated
"""

from dataclasses import dataclass, field

import tyro

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.evaluate.answerer import Generation
from mqwen.evaluate.evaluation import Actors, Evaluation
from mqwen.evaluate.generating import generate
from mqwen.storage import readable, writable


@dataclass(frozen=True)
class Generate:
    """`artifact` is a URI, `dataset` that of one that jobs/ingest.py wrote, `out` that of the folder to write to.

    Each sample's last answer is asked from the turns before it. A command that was stopped goes on when it is started
    again with the same options.
    """

    artifact: str
    dataset: str
    out: str = "out/generated"
    generation: Generation = field(default_factory=Generation)
    actors: Actors = field(default_factory=Actors)


def main() -> None:
    command = tyro.cli(Generate, description=__doc__)
    artifact, dataset, out = readable(command.artifact), readable(command.dataset), writable(command.out)
    evaluation = Evaluation.prepare(artifact, dataset, command.generation, command.actors)
    with cluster(cpus=command.actors.count * command.actors.cpus + 1):
        left_out = generate(evaluation, out, cli.counter("rows"))
    print(f"{out}: {len(evaluation.places)} rows" + (f"; {left_out} samples left out, see `error`" if left_out else ""))


if __name__ == "__main__":
    cli.run(main)
