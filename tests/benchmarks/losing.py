"""A cluster of three nodes that trains and serves loses a node, and then its head: how long until all is back.

python -m tests.benchmarks.losing
"""

import tempfile
from pathlib import Path

from mqwen.data.sources.digits import vocabulary_texts
from mqwen.demo.storage import s3_server
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.benchmarks.result import write_result
from tests.conftest import make_bucket
from tests.end_to_end.losing import lose_all


def main() -> None:
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name) / "log") as url:
        make_bucket(url)
        train_vocabulary(vocabulary_texts(), 400, Path(name) / VOCABULARY_FILE)
        work = Path(name) / "work"
        work.mkdir()
        found = lose_all(url, Path(name), work)
    write_result("losing", "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in found.items()))


if __name__ == "__main__":
    main()
