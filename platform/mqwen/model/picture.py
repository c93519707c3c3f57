"""From a picture's bytes to the square that CLIP sees, with Pillow alone.

As CLIP was trained: RGB, bicubic resize of the short side, centre crop. Normalisation is apart (`normalize`), because
training ships uint8 and normalises on the device.

H, W: height and width in pixels, equal in what comes out.
"""

import io
from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mqwen.model.errors import PictureError

# CLIP's statistics of RGB values in 0..1 (openai/clip-vit-large-patch14, preprocessor_config.json).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Encoded = bytes | bytearray | memoryview
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what the web sends; no decoder that starts programs or reads paths
MAX_PIXELS = 64_000_000  # decoded RGB takes 3 bytes a pixel: 192 MB
MAX_ASPECT = 200  # the long side grows with the short one before the crop: 224 x 44,800 at most


def decode_picture(
    source: Encoded | Image.Image, size: int, *, fast: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes, turns upright (EXIF), resizes and crops a picture; of an animation the first frame.

    Args:
        source: an encoded picture (JPEG, PNG, WebP, GIF, BMP), or a Pillow image. Transparency is dropped, not blended,
            as CLIP's own preprocessing does.
        size: side of the square that comes out, in pixels.
        fast: let the JPEG decoder shrink while it decodes (to at least `size`), as training does: two to five times the
            rate from 640 x 480 on, at a mean difference of 0.4 to 1.2 of 255 levels
            (tests/benchmarks/results/2026-11-22-picture-paths.json).
        max_pixels: largest width x height, read from the header before anything is decoded.

    Returns:
        uint8 (3, H, W), contiguous.

    Raises:
        PictureError: not a picture of an allowed format, broken or cut short, or past a limit.
    """
    if isinstance(source, Encoded):
        given = f"{len(source)} bytes"
    elif isinstance(source, Image.Image):
        given = f"a Pillow image of mode {source.mode}"
    else:
        raise PictureError(
            f"a picture is given as a file's bytes or as a Pillow image, not as {type(source).__name__}: Path(...)."
            "read_bytes() and Image.fromarray(...) make them"
        )
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
        _check_size(image.size, max_pixels)
        if fast and not isinstance(source, Image.Image):
            image.draft("RGB", (size, size))
        image.load()
        image = upright_rgb(image)
        width, height = image.size
        short = min(width, height)
        # int(), not round(): the size that CLIP's published preprocessing resizes to.
        image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    except (PictureError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{given} are no picture; allowed are {', '.join(FORMATS)}") from error
    except Exception as error:  # on hostile bytes Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise PictureError(f"{given}: the picture cannot be decoded ({error}); is it cut short or damaged?") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def are_statistics(mean: object, std: object) -> bool:
    """Whether these are a mean and a standard deviation for each of three channels."""
    return (
        all(isinstance(values, (list, tuple)) and len(values) == 3 for values in (mean, std))
        and all(type(value) in (int, float) and isfinite(value) for value in (*mean, *std))  # type: ignore[misc]
        and all(value > 0 for value in std)  # type: ignore[attr-defined]
    )


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 (..., 3, H, W) to float32, (pixels / 255 - mean) / std for each channel.

    The reference also rounds the result to fp16 on its way to the vision tower; that costs up to 2e-3 and is left out.
    """
    mean_, std_ = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (mean, std))
    return (pixels.astype(np.float32) * np.float32(1 / 255) - mean_) / std_


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width * height:
        raise PictureError(f"the picture is {width} x {height}: it has no pixels")
    if width * height > max_pixels:
        raise PictureError(f"the picture has {width} x {height} pixels; allowed are {max_pixels:,} in all")
    if max(size) > MAX_ASPECT * min(size):
        raise PictureError(f"the picture is {width} x {height}; allowed is a long side of {MAX_ASPECT} short ones")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is common in the wild, and the picture itself is whole
        return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; 16-bit grey scaled, palettes looked up, transparency dropped."""
    return _to_rgb(_upright(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise PictureError(
            f"a picture of mode {image.mode} holds numbers of no known scale; convert it to mode L (0 to 255) or I;16 "
            "(0 to 65535)"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255 instead of scaling
        levels: Any = np.asarray(image)
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    return image.convert("RGB")
