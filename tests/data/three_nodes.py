"""A driver for test_losses.py: the steps' digest from a simulated cluster of three nodes, of which it loses one.

python -m tests.data.three_nodes DATASET VOCABULARY_FILE
"""

import os
import sys
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
from ray.cluster_utils import Cluster

from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.storage import locate
from tests.data.digest import digest, ranks_steps
from tests.data.test_digest import SETTINGS

WORKERS, PER_STEP, STEPS = 3, 4, 60


def stream_of(dataset: str, vocabulary: str) -> Stream:
    processor = MQWenProcessor(MQWenTokenizer(Path(vocabulary)), image_size=16)
    return Stream(Order([open_dataset(locate(dataset))], SETTINGS), processor, rows=100_000)


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost, _ = (cluster.add_node(num_cpus=2) for _ in range(2))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose(rank: int, step: int) -> None:
        if (rank, step) == (0, STEPS // 3):
            cluster.remove_node(lost, allow_graceful=False)

    steps = ranks_steps(stream_of(*sys.argv[1:]), WORKERS, PER_STEP, STEPS, Position(), lose)
    alive = sum(node["Alive"] for node in ray.nodes())
    print(f"{alive} nodes, digest {digest(steps)}", flush=True)
    os._exit(0)  # what is left of the lost node would hold the shutdown up


if __name__ == "__main__":
    main()
