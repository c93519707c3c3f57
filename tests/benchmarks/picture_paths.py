"""How far the fast picture path is from the exact one, and how much faster.

    python tests/benchmarks/picture_paths.py FOLDER_OF_PICTURES > tests/benchmarks/results/DATE-picture-paths.json

Each picture is re-encoded as JPEG (quality 90) at the sizes below, which are what web crawls and phones hold. The
ceiling is the same decoder alone, at the fast path's scale, without resize, crop or copy.
"""

import io
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from mqwen.model.picture import FORMATS, decode_picture

SIZES = ((256, 256), (640, 480), (1024, 768), (2048, 1536))
TARGET = 224


def rate(work: Callable[[bytes], object], sources: list[bytes], seconds: float = 2.0) -> float:
    """Pictures a second on one thread; the best of three rounds, as the machine is shared."""
    best = 0.0
    for _ in range(3):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 3:
            work(sources[done % len(sources)])
            done += 1
        best = max(best, done / (time.perf_counter() - start))
    return round(best, 1)


def decoder_alone(source: bytes) -> None:
    image = Image.open(io.BytesIO(source), formats=("JPEG",))
    image.draft("RGB", (TARGET, TARGET))
    image.load()


def measure(pictures: list[Image.Image], size: tuple[int, int]) -> dict[str, object]:
    sources = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        sources.append(buffer.getvalue())
    differences = [
        np.abs(decode_picture(s, TARGET, fast=True).astype(int) - decode_picture(s, TARGET).astype(int))
        for s in sources
    ]
    return {
        "jpeg": "x".join(map(str, size)),
        "mean_difference_levels_of_255": round(statistics.mean(float(d.mean()) for d in differences), 3),
        "worst_picture_mean": round(max(float(d.mean()) for d in differences), 3),
        "p99": round(float(np.percentile(np.concatenate([d.ravel() for d in differences]), 99)), 1),
        "exact_pictures_a_second": rate(lambda s: decode_picture(s, TARGET), sources),
        "fast_pictures_a_second": rate(lambda s: decode_picture(s, TARGET, fast=True), sources),
        "ceiling_decoder_alone": rate(decoder_alone, sources),
    }


def main(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.suffix.lstrip(".").upper().replace("JPG", "JPEG") in FORMATS)
    pictures = [Image.open(path).convert("RGB") for path in files]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": f"python tests/benchmarks/picture_paths.py {folder}",
        "hardware": f"{platform.machine()}, one thread of a shared machine",
        "pillow": PIL.__version__,
        "pictures": len(pictures),
        "target": TARGET,
        "sizes": [measure(pictures, size) for size in SIZES],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
