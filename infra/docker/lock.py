"""Locks what the images install: `python -m infra.docker.lock` writes serving.txt and training.txt with hashes.

Versions are those of constraints.txt. Only hashes of files that the images can take are kept (CPython 3.11 on Linux
with glibc, x86-64; source where there is no such wheel), so that a reader can look at a change.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGES = {"serving": HERE / "serving.in", "training": ROOT / "pyproject.toml"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]  # Debian 12's glibc is 2.36
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
TAGS = {*cpython_tags((3, 11), platforms=PLATFORMS), *compatible_tags((3, 11), "cp311", PLATFORMS)}
HEAD = "# Made by `python -m infra.docker.lock`.\n"


def fits(wheel: dict[str, Any]) -> bool:
    name = wheel.get("name") or wheel["url"].rsplit("/", 1)[-1]
    return bool(parse_wheel_filename(name.replace("%2B", "+"))[3] & TAGS)


def line(package: dict[str, Any]) -> str:
    files = [one for one in package.get("wheels", []) if fits(one)] or [package["sdist"]]
    hashes = sorted(f"--hash=sha256:{one['hashes']['sha256']}" for one in files)
    marker = f" ; {package['marker']}" if "marker" in package else ""
    return " \\\n    ".join([f"{package['name']}=={package['version']}{marker}", *hashes])


def lock(source: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        # A CUDA build of torch brings the Triton that it was made with; constraints.txt has the one for CPUs.
        versions = (ROOT / "constraints.txt").read_text().splitlines()
        constraints, made = Path(folder, "constraints"), Path(folder, "pylock.toml")
        constraints.write_text("\n".join(version for version in versions if not version.startswith("triton")))
        words = ["pip", "compile", source, "--constraint", constraints, "--output-file", made, "--quiet"]
        words += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]
        subprocess.run([Path(sys.executable).with_name("uv"), *words], check=True)
        packages = tomllib.loads(made.read_text())["packages"]
    return HEAD + "\n".join(line(one) for one in packages) + "\n"


if __name__ == "__main__":
    for image, source in IMAGES.items():
        (HERE / f"{image}.txt").write_text(lock(source))
