"""What the images install: locked whole, with hashes, with the versions that are tested here."""

import re
from pathlib import Path

import pytest

from infra.docker.lock import HERE, IMAGES, ROOT

ENTRY = re.compile(r"^([a-z0-9-]+)==(\S+)( ; .+?)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M)


def locked(image: str) -> dict[str, str]:
    return {name: version for name, version, _, _ in ENTRY.findall((HERE / f"{image}.txt").read_text())}


@pytest.mark.parametrize("image", IMAGES)
def test_each_version_is_locked_with_its_hashes(image: str) -> None:
    text = (HERE / f"{image}.txt").read_text()
    assert len(locked(image)) == len(re.findall(r"^[a-z]", text, re.M)) > 50
    assert "://" not in text  # no place of one machine


@pytest.mark.parametrize("image", IMAGES)
def test_they_are_the_versions_that_are_tested(image: str) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    found = locked(image)
    assert {"ray", "torch", "transformers", "safetensors"} <= found.keys()
    common = (pinned.keys() & found.keys()) - {"triton"}  # torch's CUDA build brings its own
    assert {name: found[name] for name in common} == {name: pinned[name] for name in common}


def test_the_image_has_no_root_and_is_asked_for_its_health() -> None:
    text = Path(HERE / "Dockerfile").read_text()
    assert re.search(r"^USER 1000$", text, re.M)
    assert "HEALTHCHECK" in text
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.M):
        assert (ROOT / source).exists()
