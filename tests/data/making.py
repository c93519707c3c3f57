"""Small samples and datasets for the tests, written without ingest."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from PIL import Image

from mqwen.data.manifest import INDEX_SCHEMA, Manifest, Shards, write_index, write_manifest
from mqwen.data.sample import Sample, write_sample
from mqwen.model import MQWenProcessor
from mqwen.model.chat import encode_chat
from mqwen.storage import Location, locate

IMAGE_POSITIONS = 4  # of a picture in the tests' packs
WORDS = ("which", "digit", "is", "in", "the", "picture", "how", "many", "图片里是哪个数字", "一共有几个", "three", "七")


def picture(seed: int, size: tuple[int, int] = (40, 30), form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """An encoded picture of coloured boxes."""
    random = Random(seed)
    image = Image.new("RGB", size, tuple(random.choices(range(256), k=3)))
    for _ in range(3):
        left, top = random.randrange(size[0]), random.randrange(size[1])
        image.paste(tuple(random.choices(range(256), k=3)), (left, top, left + size[0] // 2, top + size[1] // 2))
    out = io.BytesIO()
    image.convert(mode).save(out, form, **options)
    return out.getvalue()


def random_sample(seed: int) -> Sample:
    """One or two turns about up to three pictures, or about none."""
    random = Random(seed)
    images = random.choice((0, 1, 1, 2, 3))
    messages: list[dict[str, Any]] = []
    for turn in range(random.choice((1, 1, 2))):
        question = {"type": "text", "text": " ".join(random.choices(WORDS, k=random.randint(1, 6)))}
        content = [*[{"type": "image"}] * images, question] if not turn else question["text"]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": " ".join(random.choices(WORDS, k=random.randint(1, 3)))})
    pictures = [picture(seed * 10 + n, form=random.choice(("PNG", "JPEG"))) for n in range(images)]
    return Sample(f"sample-{seed:04d}", messages, pictures, f"made/{seed}")


def write_dataset(
    folder: Path | Location, processor: MQWenProcessor, samples: Sequence[Sample], shard_samples: int = 16
) -> Location:
    """What ingest would write."""
    dataset = locate(folder)
    shards = []
    for start in range(0, len(samples), shard_samples):
        buffer, rows, name = io.BytesIO(), list[dict[str, Any]](), f"shard-{start:06d}"
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples[start : start + shard_samples]:
                offset = buffer.tell()
                write_sample(tar, sample)
                tokens = len(encode_chat(processor.tokenizer, sample.messages).input_ids)
                row = {"key": sample.key, "offset": offset, "nbytes": buffer.tell() - offset, "tokens": tokens}
                rows.append(row | {"images": len(sample.pictures), "sha256": sample.sha256()})
        data = buffer.getvalue()
        (dataset / f"{name}.tar").write_bytes(data)
        shards.append(
            {
                "name": name,
                "file": f"{name}.tar",
                "samples": len(rows),
                "tokens": sum(row["tokens"] for row in rows),
                "images": sum(row["images"] for row in rows),
                "nbytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "index_sha256": write_index(dataset, name, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)),
            }
        )
    write_manifest(dataset, Manifest(Shards(shards), processor.tokenizer.fingerprint, {}))
    return dataset
