"""A training's command line. It needs no torch and no Ray: a wrong option is refused before they are imported."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mqwen.train.recipes import RECIPES, recipe
from mqwen.train.settings import RunSettings


def read_settings(description: str | None) -> RunSettings:
    """The recipe that --recipe names, overridden by every other option. Help needs none: it shows the first one's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=not {"-h", "--help"} & set(sys.argv[1:]), default=next(iter(RECIPES)))
    named, rest = parser.parse_known_args()
    about = f"{description}\n--recipe is one of {', '.join(RECIPES)}; the defaults below are those of {named.recipe}."
    return overridden(recipe(named.recipe), rest, about)


def overridden(settings: RunSettings, words: list[str], description: str | None = None) -> RunSettings:
    """The settings with what the command line's words say instead. A dictionary is replaced as a whole."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_pairs)
    registry.primitive_rule(_json)
    return tyro.cli(RunSettings, default=settings, args=words, description=description, registry=registry)


def _pairs(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """--optimizer.learning-rates 'visual.*' 1e-4 'feature_proj.*' 1e-3"""
    if kind.type != dict[str, float]:
        return None

    def read(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError(f"names and numbers take turns; these are {len(words)} words")
        return {name: float(number) for name, number in zip(words[::2], words[1::2], strict=True)}

    def show(values: dict[str, float]) -> list[str]:
        return [str(word) for pair in values.items() for word in pair]

    return PrimitiveConstructorSpec("*", "[NAME NUMBER ...]", read, _is_dict, show)


def _json(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """--model.config '{"hidden_size": 1024}'"""
    if kind.type != dict[str, Any]:
        return None

    def read(words: list[str]) -> dict[str, Any]:
        value = json.loads(words[0])
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        return value

    return PrimitiveConstructorSpec(1, "JSON", read, _is_dict, lambda value: [json.dumps(value)])


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
