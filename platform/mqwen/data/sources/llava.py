"""LLaVA conversations: a JSON list beside a folder of pictures.

    [{"id": "7", "image": "7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

`image` may be one path, a list of paths or missing; each `<image>` in the text stands for the next one. Ids need not
be unique: LLaVA's own files ask several conversations about one picture under one id.

complex_reasoning_77k.json of LLaVA-Instruct is such a file; its pictures are the folder train2017 of COCO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mqwen.data.conversation import from_llava
from mqwen.data.errors import SampleError
from mqwen.data.sample import Sample
from mqwen.data.sources.files import Record, check_folder, in_chunks, read_picture, read_records
from mqwen.data.sources.keys import Keys
from mqwen.storage import Location


@dataclass(frozen=True)
class LlavaSource:
    """LLaVA's conversations JSON, with pictures in a folder."""

    conversations: Location
    pictures: Location

    def chunks(self, size: int) -> list[list[tuple[str, Record]]]:
        """The records, each with its key, in lists of `size`.

        Raises DataError where the file is no list of conversations, or the pictures' folder is not there.
        """
        records = read_records(self.conversations, "conversations")
        check_folder(self.pictures)
        keys = Keys()
        return in_chunks([(keys.make(_id(record), n), record) for n, record in enumerate(records)], size)

    def read(self, chunk: list[tuple[str, Record]]) -> Iterator[tuple[str, Sample | SampleError]]:
        for key, record in chunk:
            try:
                yield key, self._sample(key, record)
            except SampleError as error:
                yield key, error

    def _sample(self, key: str, record: Record) -> Sample:
        paths = record.get("image") or []
        paths = paths if isinstance(paths, list) else [paths]
        messages = from_llava(record.get("conversations"))
        return Sample(key, messages, [read_picture(self.pictures, path) for path in paths], _id(record))


def _id(record: Record) -> str:
    return str(record.get("id", ""))
