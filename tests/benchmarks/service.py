"""The service under load, with replicas that come, go and die.

python -m tests.benchmarks.service load [--minutes 10]   1.5 x capacity; 40 % leave, or send rubbish
python -m tests.benchmarks.service kill                  a replica's SIGKILL, beside an empty Serve replica's
python -m tests.benchmarks.service upgrade               `serve deploy` of a changed config under load
python -m tests.benchmarks.service scale                 a load step, one replica to three and back; a plot too
python -m tests.benchmarks.service routing               prefix hits in conversations, by affinity and at random

Each starts a service of the tests' tiny model of its own. `make soak` runs them all and holds their figures to limits.
"""

import tempfile
from pathlib import Path

import tyro

from tests.benchmarks.result import RESULTS, write_result
from tests.engine.tiny import build_artifact
from tests.serve import soaking


def main(what: tyro.conf.Positional[soaking.What], minutes: float = 10) -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_artifact(Path(folder) / "tiny")
        table = soaking.RUNS[what](artifact, Path(folder), minutes)
        for plot in Path(folder).glob("*.png"):
            plot.rename(RESULTS / f"{plot.stem}.png")
        write_result(f"service-{what}", table.markdown())


if __name__ == "__main__":
    tyro.cli(main)
