"""A sample: one conversation and its pictures, as a shard stores it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

from mqwen.data.errors import DataError


@dataclass(frozen=True)
class Sample:
    """`messages` are chat messages ({"role", "content"}; content is text or a list of parts, see model/chat.py).

    `pictures` are encoded image files (JPEG, PNG, ...) in the order of the messages' image parts.
    """

    key: str
    messages: list[dict[str, Any]]
    pictures: list[bytes] = field(default_factory=list)
    source: str = ""

    def sha256(self) -> str:
        digest = hashlib.sha256(json.dumps(self.messages, sort_keys=True, ensure_ascii=False).encode())
        for picture in self.pictures:
            digest.update(hashlib.sha256(picture).digest())
        return digest.hexdigest()


_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}


def _suffix(picture: bytes) -> str:
    return next((name for magic, name in _SUFFIXES.items() if picture.startswith(magic)), "img")


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Appends the sample as WebDataset members KEY.json, KEY.0.png, KEY.1.jpg, ..."""
    body = json.dumps({"messages": sample.messages, "source": sample.source}, ensure_ascii=False).encode()
    members = [(f"{sample.key}.json", body)]
    members += [(f"{sample.key}.{n}.{_suffix(picture)}", picture) for n, picture in enumerate(sample.pictures)]
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def read_sample(members: bytes) -> Sample:
    """The sample whose tar members `members` holds, headers included.

    Raises DataError where the bytes are no tar members or hold no readable conversation.
    """
    body: dict[str, Any] | None = None
    key, pictures = "", []
    try:
        with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                data = file.read() if file else b""
                if info.name.endswith(".json"):
                    key, body = info.name.removesuffix(".json"), json.loads(data)
                else:
                    pictures.append(data)
        if body is None:
            raise DataError("a sample has no .json member")
        return Sample(key, body["messages"], pictures, body.get("source", ""))
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"sample {key or '(unknown key)'} cannot be read from its shard: {error}") from error
