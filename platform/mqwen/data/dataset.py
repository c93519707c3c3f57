"""A dataset as its readers carry it: what its manifest says, and where its shards lie."""

from __future__ import annotations

from dataclasses import dataclass

from mqwen.data.errors import DataError
from mqwen.data.manifest import Manifest, read_manifest
from mqwen.storage import Location, readable


@dataclass(frozen=True)
class Dataset:
    """`location` holds manifest and indexes, `files` the shards themselves."""

    location: Location
    manifest: Manifest
    files: Location

    def check_shards(self) -> None:
        """Raises DataError where a shard is missing or is not as long as it was written. Costs one listing."""
        sizes = self.files.sizes()
        for file, nbytes in self.manifest.shards.table.select(["file", "nbytes"]).to_pandas().itertuples(index=False):
            if file not in sizes:
                raise DataError(f"{self.files / file} is missing; copy the dataset again, or ingest it again")
            if sizes[file] != nbytes:
                raise DataError(
                    f"{self.files / file} has {sizes[file]} bytes, {nbytes} were written; copy the dataset again, or "
                    "ingest it again"
                )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises DataError where another tokenizer than the one of this fingerprint counted the dataset's tokens."""
        if self.manifest.tokenizer != fingerprint:
            raise DataError(f"{self.location} was ingested with another tokenizer than this model's; ingest it again")


def open_dataset(location: Location) -> Dataset:
    """Raises DataError where none lies there, EmptyDatasetError where it has no samples."""
    manifest = read_manifest(location)
    return Dataset(location, manifest, readable(manifest.files) if manifest.files else location)
