"""Ingest: pictures and conversations into WebDataset shards with an index and a manifest.

python jobs/ingest.py llava --conversations data.json --pictures photos/ --dataset s3://bucket/data --tokenizer DIR
python jobs/ingest.py webdataset --files s3://bucket/tars --in-place --dataset out/data --tokenizer DIR

An ingest that was stopped goes on when it is started again. DATASET/report.html shows what it found.
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from tyro.conf import CascadeSubcommandArgs, arg, subcommand

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.data.ingest import Ingest, IngestSettings
from mqwen.data.sources.captions import ChallengerSource, TableSource
from mqwen.data.sources.digits import DigitsSource
from mqwen.data.sources.llava import LlavaSource
from mqwen.data.sources.stored import ParquetSource, WebDatasetSource
from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import local_folder, readable, writable

AnySource = (
    Annotated[LlavaSource, subcommand("llava")]
    | Annotated[ChallengerSource, subcommand("challenger")]
    | Annotated[TableSource, subcommand("table")]
    | Annotated[WebDatasetSource, subcommand("webdataset")]
    | Annotated[ParquetSource, subcommand("parquet")]
    | Annotated[DigitsSource, subcommand("digits")]
)


@dataclass(frozen=True)
class Command:
    """Where to: the dataset's URI, and the tokenizer whose counts its index holds.

    `in_place` makes the indexes of tars or Parquet files alone; they are then read where they lie.
    """

    dataset: str
    tokenizer: str
    source: Annotated[AnySource, arg(name="")]
    in_place: bool = False
    settings: IngestSettings = field(default_factory=IngestSettings)


def main() -> None:
    command = tyro.cli(Command, description=__doc__, registry=cli.uris(), config=(CascadeSubcommandArgs,))
    folder = local_folder(readable(command.tokenizer), without="*.safetensors", needs=VOCABULARY_FILE)
    processor = MQWenProcessor(MQWenTokenizer.from_pretrained(folder))
    dataset = writable(command.dataset)
    ingest = Ingest.prepare(command.source, dataset, processor, command.settings, command.in_place)
    with cluster(cpus=2):
        manifest = ingest.run(lambda done, chunks: print(f"chunk {done}/{chunks}", flush=True))
    tokens, shards = manifest.shards.total("tokens"), len(manifest.shards)
    print(f"{command.dataset}: {manifest.samples} samples, {tokens} tokens in {shards} shards")


if __name__ == "__main__":
    cli.run(main)
