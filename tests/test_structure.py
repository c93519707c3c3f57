"""What holds the rooms apart: design.md's arrows, and what has no place in the repository."""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The rooms that each room may import. jobs, serve and what stands at their side may import all below them.
BASE = {"model", "storage", "telemetry", "errors"}
ROOMS = {
    "errors": set[str](),
    "model": {"errors"},
    "telemetry": {"errors"},
    "storage": {"errors", "telemetry"},
    "data": BASE,
    "resources": {"errors"},
    "train": BASE | {"resources"},
    "engine": BASE,
    "evaluate": BASE | {"data", "engine", "resources"},
    "release": BASE | {"data", "train", "evaluate"},
}
TOP = {"jobs", "serve", "demo", "cli", "cluster", "training"}  # the last four live in mqwen, and no room imports them

# Libraries that a room must not know, at any place of a file.
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "gradio", "ray.serve"}
STORES = {"boto3", "botocore", "pyarrow.fs"}
FORBIDDEN = {
    "model": HTTP | STORES | {"ray"},
    "engine": HTTP,
    "evaluate": HTTP | {"boto3", "botocore"},
    "release": HTTP - {"httpx"} | {"boto3", "botocore"},
    "data": HTTP | {"boto3", "botocore"},
    "train": HTTP | {"boto3", "botocore"},
    "storage": HTTP | {"ray"},
    "telemetry": HTTP | STORES,
    "errors": HTTP | STORES | {"ray"},
}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside of functions: dotted names, with what `from` takes from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str) -> list[Path]:
    folder = ROOT / room if room in ("jobs", "serve") else ROOT / "platform" / "mqwen" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in, or None for other packages."""
    first, *rest = module.split(".")
    return rest[0] if first == "mqwen" and rest else first if first in ("jobs", "serve") else None


def test_platform_is_no_package() -> None:
    assert not list((ROOT / "platform").glob("*.py"))
    code = "import platform, sys; print(platform.__file__, platform.python_version())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.startswith(str(ROOT / "platform"))
    assert found.stdout.split()[1] == sys.version.split()[0]


def test_every_room_is_known() -> None:
    found = {path.stem for path in (ROOT / "platform" / "mqwen").iterdir() if not path.name.startswith("__")}
    assert found <= ROOMS.keys() | TOP


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    for file in files(room):
        for module in imports(file):
            other = room_of(module)
            assert other is None or other == room or other in ROOMS[room], f"{file} imports {module}"


@pytest.mark.parametrize("room", FORBIDDEN)
def test_what_a_room_does_not_know(room: str) -> None:
    for file in files(room):
        for module in imports(file):
            for name in FORBIDDEN[room]:
                assert not f"{module}.".startswith(f"{name}."), f"{file} imports {module}"


def test_jobs_and_serve_import_each_other_nowhere() -> None:
    for room, other in (("jobs", "serve"), ("serve", "jobs")):
        for file in files(room):
            assert not [module for module in imports(file) if room_of(module) == other], file


def test_jobs_are_short() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in files("jobs")}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def tracked() -> list[Path]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_file() -> None:
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in tracked()}
    assert len(sizes) > 50
    assert {name: size for name, size in sizes.items() if size > 400_000} == {}


def test_no_place_of_one_machine() -> None:
    places = re.compile(b"/" + rb"(?:work/(?:main|shared)\b|Users/|tmp/bash_jobs)")  # in two, not to find itself
    found = [str(file.relative_to(ROOT)) for file in tracked() if places.search(file.read_bytes())]
    assert found == []


def test_what_rayignore_names_is_not_counted_as_uploaded() -> None:
    """Git tracks these files, and lists them whatever the ignore files say."""
    counted = {path.relative_to(ROOT) for path in runpy.run_path(str(ROOT / "infra/runtime_env.py"))["uploaded"]()}
    assert Path("serve/app.py") in counted
    assert not [path for path in counted if path.parts[0] == "tests"]
