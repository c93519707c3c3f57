"""Pictures as clients send them, and small files that say, or become, much more than they are."""

import base64
import io
import struct
import zlib

from PIL import Image

from tests.engine.tiny import picture


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing: a decompression bomb's beginning."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def png_with(kind: bytes, name: bytes) -> bytes:
    """A small picture with a compressed text (zTXt) or colour profile (iCCP) that is 100 MB long."""
    content = picture(1)
    return content[:33] + png_chunk(kind, name + b"\0\0" + zlib.compress(bytes(100_000_000))) + content[33:]


def gif_screen(width: int, height: int) -> bytes:
    """A GIF of 4 x 4 pixels on a screen of this size."""
    content = bytearray(saved("GIF", (4, 4)))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def bmp_header(width: int, height: int) -> bytes:
    """A BMP without a pixel."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def saved(form: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, form, **options)
    return out.getvalue()


def animation(frames: int) -> bytes:
    others = [Image.new("RGB", (64, 48), (number % 256, 0, 0)) for number in range(frames)]
    return saved("GIF", save_all=True, append_images=others)


def jpeg_with_exif(size: int) -> bytes:
    exif = Image.Exif()
    exif[0x9286] = b"x" * size  # the user's comment
    return saved("JPEG", exif=exif)
