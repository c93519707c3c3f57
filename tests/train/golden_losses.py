"""Writes the golden losses anew: `python -m tests.train.golden_losses`."""

import json
import tempfile
from pathlib import Path

from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.data.making import WORDS, random_sample, write_dataset
from tests.train.conftest import Ranks
from tests.train.making import SEEDS, SIDE, tiny_settings
from tests.train.test_loop import GOLDEN, fifty_steps, run_many


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        train_vocabulary([" ".join(WORDS)], 300, folder / "tokenizer" / VOCABULARY_FILE)
        processor = MQWenProcessor(MQWenTokenizer.from_pretrained(folder / "tokenizer"), image_size=SIDE)
        write_dataset(folder / "dataset", processor, [*map(random_sample, SEEDS)])
        settings = tiny_settings(folder / "tokenizer", folder / "dataset", folder / "runs")
        ranks = Ranks(folder)
        ((records, _),) = ranks.run(1, run_many, fifty_steps(settings))
        ranks.end()
    GOLDEN.write_text(json.dumps([record.loss for record in records], indent=0) + "\n")


if __name__ == "__main__":
    main()
