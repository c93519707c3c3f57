"""A sample: one conversation and its pictures, as a shard stores it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mqwen.data.conversation import CAPTIONS, from_fields, to_json
from mqwen.data.errors import SampleError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "img", "image", "images")  # names that pictures go by


@dataclass(frozen=True)
class Sample:
    """`messages` are chat messages ({"role", "content"}; content is text or a list of parts, see model/chat.py).

    `key` is its name in the dataset, in shards of ours without "/" and "."; `source` says where it came from.
    `pictures` are encoded image files (JPEG, PNG, ...) in the order of the messages' image parts.
    """

    key: str
    messages: list[dict[str, Any]]
    pictures: list[bytes] = field(default_factory=list)
    source: str = ""

    def sha256(self) -> str:
        """Of what it trains on: conversation and pictures."""
        digest = hashlib.sha256(to_json(self.messages, sort_keys=True))
        for picture in self.pictures:
            digest.update(hashlib.sha256(picture).digest())
        return digest.hexdigest()


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Appends the sample as WebDataset members KEY.json, KEY.0.png, KEY.1.jpg, ..."""
    members = [(f"{sample.key}.json", to_json({"messages": sample.messages, "source": sample.source}))]
    members += [(f"{sample.key}.{n}.{_suffix(picture)}", picture) for n, picture in enumerate(sample.pictures)]
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def read_sample(members: bytes, question: str = "") -> Sample:
    """The sample whose tar members `members` holds, headers included. They may be of any WebDataset's making: a JSON
    with a conversation, or a text that captions the pictures, as the answer to `question`.

    Raises SampleError where the bytes are no tar members or hold no readable conversation.
    """
    with faults_of_a_sample():
        with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
            found = [(info.name, _content(tar, info)) for info in tar]
        key = split_name(found[0][0])[0]
        return sample_of(key, [(split_name(name)[1], data) for name, data in found], question)


@contextmanager
def faults_of_a_sample() -> Iterator[None]:
    """Raises SampleError for whatever the block raises: it reads one sample's bytes, and those may be anything."""
    try:
        yield
    except SampleError:
        raise
    except UnicodeDecodeError as error:
        raise SampleError("text", f"its text is not UTF-8 ({error})") from error
    except Exception as error:  # on hostile bytes tarfile, json and Arrow raise nearly anything
        raise SampleError("unreadable", f"{type(error).__name__}: {error}") from error


def split_name(member: str) -> tuple[str, str]:
    """A member's key and the name of its field, by WebDataset's rule: the file's name is cut at its first dot."""
    folder, _, name = member.rpartition("/")
    stem, _, field_name = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, field_name.lower()


def sample_of(key: str, found: Iterable[tuple[str, Any]], question: str) -> Sample:
    """The sample of a record's named fields: pictures, in their order, and a conversation (see conversation.py).

    A picture is bytes, or {"bytes": ...} as Hugging Face's datasets have it, or a list of those.
    """
    fields: dict[str, Any] = {}
    pictures: list[bytes] = []
    for name, value in found:
        if name.rpartition(".")[2] in PICTURES:
            pictures += [_picture(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
        elif name == "json":
            body = value if isinstance(value, Mapping) else json.loads(value)
            if not isinstance(body, Mapping):
                raise SampleError("unreadable", f"its JSON is {type(body).__name__}; an object is allowed")
            fields |= body
        elif name in CAPTIONS and isinstance(value, bytes):
            fields[name] = value.decode("utf-8")
        else:
            fields[name] = value
    return Sample(key, from_fields(fields, question), pictures, str(fields.get("source", "")))


def _picture(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):
        raise SampleError("missing picture", f"{value!r:.200} holds no bytes of a picture")
    return data


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info) if info.isreg() else None
    if file is None:
        raise SampleError("unreadable", f"its member {info.name!r:.80} is no file")
    return file.read()


_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def _suffix(picture: bytes) -> str:
    return next((name for magic, name in _SUFFIXES.items() if picture.startswith(magic)), "img")
