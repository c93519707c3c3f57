"""Trace: the samples that a step of a run trained on, with their keys, sources and token counts.

python jobs/trace.py s3://bucket/runs/first 500
"""

from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from mqwen import cli
from mqwen.storage import readable


@dataclass(frozen=True)
class Trace:
    """`run` is a run's folder, or its URI; `step` counts from 1."""

    run: Positional[str]
    step: Positional[int]


def main() -> None:
    command = tyro.cli(Trace, description=__doc__)
    from mqwen.data.trace import trace
    from mqwen.training import reader_of  # brings torch and Ray, for which a wrong option need not wait

    reader, last = reader_of(readable(command.run), command.step)
    table = Table("epoch, window, row", "pack", "key", "source", "tokens", "pictures", "positions", "left out")
    for one in trace(reader, last):
        place, pack = ", ".join(map(str, one.place)), "" if one.pack < 0 else str(one.pack)
        counts = map(str, (one.tokens, one.images, one.positions))
        table.add_row(place, pack, one.key, one.source, *counts, one.reason)
    Console(width=None if Console().is_terminal else 200).print(table)


if __name__ == "__main__":
    cli.run(main)
