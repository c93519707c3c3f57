"""Pictures with captions: AI Challenger's JSON, and tables (CSV, TSV) of picture paths and captions.

AI Challenger's caption_train_annotations_20170902.json has five captions of each picture:

    [{"url": "...", "image_id": "8f00.jpg", "caption": ["...", "...", "...", "...", "..."]}]

Each caption is the answer of a sample, to one of QUESTIONS, drawn by the sample's key.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mqwen.data.conversation import from_caption
from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.data.sample import Sample
from mqwen.data.sources.files import check_folder, in_chunks, read_picture, read_records
from mqwen.data.sources.keys import Keys
from mqwen.storage import Location, MissingFileError

QUESTION = "What does this picture show?"
QUESTIONS = ("这幅图像描述了什么？", "这幅图像中有什么？")
Entry = tuple[str, Any, Any]  # key, path, caption


@dataclass(frozen=True)
class ChallengerSource:
    """AI Challenger's JSON. `captions` is how many of a picture's captions become samples, the first ones."""

    annotations: Location
    pictures: Location
    captions: int = 5

    def chunks(self, size: int) -> list[list[Entry]]:
        """Raises DataError where the file is no list of annotations, or the pictures' folder is not there."""
        if self.captions < 1:
            raise DataError(f"--captions is {self.captions}; at least 1 is needed")
        records = read_records(self.annotations, "annotations")
        check_folder(self.pictures)
        keys, entries = Keys(), list[Entry]()
        for number, record in enumerate(records):
            path, captions = record.get("image_id"), record.get("caption")
            for caption in captions[: self.captions] if isinstance(captions, list) and captions else [captions]:
                entries.append((keys.make(_stem(path), number), path, caption))
        return in_chunks(entries, size)

    def read(self, chunk: list[Entry]) -> Iterator[tuple[str, Sample | SampleError]]:
        return (_captioned(self.pictures, QUESTIONS, *entry) for entry in chunk)


@dataclass(frozen=True)
class TableSource:
    """A CSV or TSV (by its name) of pictures' paths and captions, in UTF-8, whose first line names its columns.

    `question` is what each caption answers.
    """

    table: Location
    pictures: Location
    question: str = QUESTION
    picture_column: str = "image"
    caption_column: str = "caption"

    def chunks(self, size: int) -> list[list[Entry]]:
        """Raises DataError where the table cannot be read or lacks a column, or the pictures' folder is not there."""
        try:
            text = self.table.read_bytes().decode("utf-8-sig", "surrogateescape")
        except MissingFileError as error:
            raise DataError(f"{error}; it should be a CSV or TSV file") from error
        rows = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if self.table.name.endswith(".tsv") else ","
        )
        columns = rows.fieldnames or []
        for column in (self.picture_column, self.caption_column):
            if column not in columns:
                raise DataError(f"{self.table} has no column {column!r}; it has {', '.join(columns)!r:.200}")
        check_folder(self.pictures)
        keys, entries = Keys(), list[Entry]()
        try:
            for number, row in enumerate(rows):
                path = row[self.picture_column]
                entries.append((keys.make(_stem(path), number), path, row[self.caption_column]))
        except csv.Error as error:
            raise DataError(f"{self.table}, line {rows.line_num}: {error}") from error
        if not entries:
            raise EmptyDatasetError(f"{self.table} holds no rows")
        return in_chunks(entries, size)

    def read(self, chunk: list[Entry]) -> Iterator[tuple[str, Sample | SampleError]]:
        return (_captioned(self.pictures, (self.question,), *entry) for entry in chunk)


def _captioned(
    pictures: Location, questions: tuple[str, ...], key: str, path: Any, caption: Any
) -> tuple[str, Sample | SampleError]:
    try:
        drawn = questions[hashlib.sha256(key.encode()).digest()[0] % len(questions)]
        messages = from_caption(caption, drawn)
        return key, Sample(key, messages, [read_picture(pictures, path)], str(path))
    except SampleError as error:
        return key, error


def _stem(path: Any) -> str:
    return PurePosixPath(path).stem if isinstance(path, str) else ""
