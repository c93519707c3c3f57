"""A training's command line. It needs no torch and no Ray: a wrong option is refused before they are imported."""

from __future__ import annotations

import argparse
import sys

import tyro

from mqwen.train.recipes import RECIPES, recipe
from mqwen.train.settings import RunSettings


def read_settings(description: str | None) -> RunSettings:
    """The recipe that --recipe names, overridden by every other option. Help needs none: it shows the first one's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=not {"-h", "--help"} & set(sys.argv[1:]), default=next(iter(RECIPES)))
    named, rest = parser.parse_known_args()
    about = f"{description}\n--recipe is one of {', '.join(RECIPES)}; the defaults below are those of {named.recipe}."
    return tyro.cli(RunSettings, default=recipe(named.recipe), args=rest, description=about)
