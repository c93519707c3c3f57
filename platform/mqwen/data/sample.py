"""A sample: one conversation and its pictures, as a shard stores it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

from mqwen.data.errors import SampleError


@dataclass(frozen=True)
class Sample:
    """`messages` are chat messages ({"role", "content"}; content is text or a list of parts, see model/chat.py).

    `key` is its name in the dataset, without "/" and "."; `source` says where it came from. `pictures` are encoded
    image files (JPEG, PNG, ...) in the order of the messages' image parts.
    """

    key: str
    messages: list[dict[str, Any]]
    pictures: list[bytes] = field(default_factory=list)
    source: str = ""

    def sha256(self) -> str:
        """Of what it trains on: conversation and pictures."""
        digest = hashlib.sha256(_json(self.messages, sort_keys=True))
        for picture in self.pictures:
            digest.update(hashlib.sha256(picture).digest())
        return digest.hexdigest()


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Appends the sample as WebDataset members KEY.json, KEY.0.png, KEY.1.jpg, ..."""
    members = [(f"{sample.key}.json", _json({"messages": sample.messages, "source": sample.source}))]
    members += [(f"{sample.key}.{n}.{_suffix(picture)}", picture) for n, picture in enumerate(sample.pictures)]
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def read_sample(members: bytes) -> Sample:
    """The sample whose tar members `members` holds, headers included.

    Raises SampleError where the bytes are no tar members or hold no readable conversation.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
            (name, body), *pictures = [(info.name, _content(tar, info)) for info in tar]
        fields = json.loads(body)
        return Sample(name.removesuffix(".json"), list(fields["messages"]), [p for _, p in pictures], fields["source"])
    except SampleError:
        raise
    except Exception as error:  # on hostile bytes tarfile and json raise nearly anything
        raise SampleError("unreadable", f"{type(error).__name__}: {error}") from error


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info) if info.isreg() else None
    if file is None:
        raise SampleError("unreadable", f"its member {info.name!r:.80} is no file")
    return file.read()


def _json(value: Any, sort_keys: bool = False) -> bytes:
    """UTF-8 even where text holds half of a surrogate pair, which JSON can write as an escape and UTF-8 cannot."""
    return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys).encode("utf-8", "backslashreplace")


_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def _suffix(picture: bytes) -> str:
    return next((name for magic, name in _SUFFIXES.items() if picture.startswith(magic)), "img")
