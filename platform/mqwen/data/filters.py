"""What ingest leaves out though it could be read, and how it makes pictures smaller."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from mqwen.data.errors import DataError, SampleError
from mqwen.model.picture import upright_rgb

JPEG_QUALITY = 90
LEFT_OUT = ("duplicate", "small picture", "narrow picture")  # reasons that are no fault of a sample


@dataclass(frozen=True)
class Filters:
    """A picture's shorter side must have `min_side` pixels at least, and its longer side be `max_aspect` times as long
    at most. One whose longer side is above `max_side` is made smaller and becomes a JPEG; 0 leaves all as they are.
    """

    min_side: int = 1
    max_aspect: float = 200.0
    max_side: int = 0

    def check(self) -> None:
        if self.min_side < 1:
            raise DataError(f"--settings.filters.min-side is {self.min_side}; at least 1 is needed")
        if not self.max_aspect >= 1:
            raise DataError(f"--settings.filters.max-aspect is {self.max_aspect}; at least 1 is needed")
        if self.max_side < 0:
            raise DataError(f"--settings.filters.max-side is {self.max_side}; 0 for none, or a number of pixels")

    def judge(self, width: int, height: int) -> None:
        """Raises SampleError for a picture that is to be left out."""
        short, long = sorted((width, height))
        if short < self.min_side:
            raise SampleError(LEFT_OUT[1], f"{width} x {height} pixels, {self.min_side} a side are wanted")
        if long > self.max_aspect * short:
            raise SampleError(LEFT_OUT[2], f"{width} x {height} pixels, at most 1:{self.max_aspect:g} is wanted")

    def shrink(self, picture: bytes) -> bytes:
        """The picture, whose longer side has `max_side` pixels at most."""
        if not self.max_side or max(picture_size(picture)) <= self.max_side:
            return picture
        side = (self.max_side, self.max_side)
        opened = Image.open(io.BytesIO(picture))
        opened.draft("RGB", side)
        image = upright_rgb(opened)
        image.thumbnail(side, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=JPEG_QUALITY)
        return out.getvalue()


def picture_size(picture: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    with Image.open(io.BytesIO(picture)) as image:
        return image.size
