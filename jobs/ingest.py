"""Ingest: pictures and conversations into WebDataset shards with an index and a manifest.

python jobs/ingest.py llava --conversations data.json --pictures photos/ --dataset s3://bucket/data --tokenizer DIR
python jobs/ingest.py digits --pictures 6000 --dataset out/data --tokenizer DIR
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.data.ingest import Ingest, IngestSettings, Source
from mqwen.data.sources.digits import DigitsSource, Split
from mqwen.data.sources.llava import LlavaSource
from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import local_folder, readable, writable


@dataclass(frozen=True)
class Into:
    """Where to: the dataset's URI, and the tokenizer whose counts its index holds."""

    dataset: str
    tokenizer: str
    settings: IngestSettings = field(default_factory=IngestSettings)


@dataclass(frozen=True)
class Llava(Into):
    """LLaVA's conversations JSON, with pictures in a folder."""

    conversations: str = tyro.MISSING
    pictures: str = tyro.MISSING

    def source(self) -> Source:
        return LlavaSource(readable(self.conversations), readable(self.pictures))


@dataclass(frozen=True)
class Digits(Into):
    """The demo's: pictures of handwritten digits with questions in English and Chinese."""

    pictures: int = 6000
    seed: int = 0
    split: Split = "train"

    def source(self) -> Source:
        return DigitsSource(self.pictures, self.seed, self.split)


def main() -> None:
    command = tyro.cli(
        Annotated[Llava, tyro.conf.subcommand("llava")] | Annotated[Digits, tyro.conf.subcommand("digits")],
        description=__doc__,
    )
    folder = local_folder(readable(command.tokenizer), without="*.safetensors", needs=VOCABULARY_FILE)
    processor = MQWenProcessor(MQWenTokenizer.from_pretrained(folder))
    ingest = Ingest.prepare(command.source(), writable(command.dataset), processor, command.settings)
    with cluster(cpus=2):
        manifest = ingest.run(lambda done, shards: print(f"shard {done}/{shards}", flush=True))
    tokens = sum(shard.tokens for shard in manifest.shards)
    print(f"{command.dataset}: {manifest.samples} samples, {tokens} tokens in {len(manifest.shards)} shards")


if __name__ == "__main__":
    cli.run(main)
