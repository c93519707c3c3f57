"""Release: a run's checkpoint becomes the model that clients reach, if it is good enough; or the one before does again.

python jobs/release.py ship --run out/runs/first --to out/releases --heldout out/heldout --bar.exact-match 0.9 \\
    --service.config serve.yaml
python jobs/release.py roll-back --service.config serve.yaml
"""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro
from ray.serve.schema import ServeDeploySchema
from rich.console import Console

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.release.release import Release, ReleaseSettings
from mqwen.release.service import Service, ServiceSettings


@dataclass(frozen=True)
class Ship(ReleaseSettings):
    __doc__ = ReleaseSettings.__doc__


@dataclass(frozen=True)
class RollBack:
    """The application that stands by becomes the live one again, and the live one stands by."""

    service: ServiceSettings


def ship(settings: Ship, service: Service) -> str:
    release = Release(settings, service)
    release.export()
    print(f"exported to {release.folder}", flush=True)
    with cluster(cpus=settings.actors.count * settings.actors.cpus + 1):
        scores = release.evaluate(cli.counter("answers"))
        print("above the bar: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()), flush=True)
        return release.deploy(cli.counter("canary answers"), lambda found: Console().print(found.table()))


def main() -> None:
    command = tyro.cli(
        Annotated[Ship, tyro.conf.subcommand("ship")] | Annotated[RollBack, tyro.conf.subcommand("roll-back")],
        description=__doc__,
    )
    service = Service(command.service, os.environ.get("MQWEN_API_KEY", ""), ServeDeploySchema.model_validate)
    print(ship(command, service) if isinstance(command, Ship) else service.roll_back())


if __name__ == "__main__":
    cli.run(main)
