"""Export: a run's checkpoint as an artifact, a folder of safetensors that serving and `transformers` load.

python jobs/export.py --run out/runs/first --to out/artifact [--step 500]
"""

from dataclasses import dataclass

import tyro

from mqwen import cli
from mqwen.storage import filled, readable, writable
from mqwen.train.export import export


@dataclass(frozen=True)
class Export:
    """`run` is the run's URI, `to` the artifact's, `step` a checkpoint other than the newest."""

    run: str
    to: str
    step: int | None = None


def main() -> None:
    command = tyro.cli(Export, description=__doc__)
    with filled(writable(command.to), last="config.json") as folder:
        step = export(readable(command.run), folder, command.step)
    print(f"{command.to}: the weights of step {step}")


if __name__ == "__main__":
    cli.run(main)
