"""A training's command line. It needs no torch and no Ray: a wrong option is refused before they are imported."""

from __future__ import annotations

import argparse

import tyro

from mqwen.train.recipes import recipe
from mqwen.train.settings import RunSettings


def read_settings(description: str | None) -> RunSettings:
    """The recipe that --recipe names, overridden by every other option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    named, rest = parser.parse_known_args()
    return tyro.cli(RunSettings, default=recipe(named.recipe), args=rest, description=description)
