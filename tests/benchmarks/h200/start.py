"""Loads an artifact as a replica does, and answers one request.

python -m tests.benchmarks.h200.start FOLDER DEVICE TIME, the last being that of the start, by time.time().
"""

import sys
import time
from pathlib import Path


def main(folder: str, device: str, begun: float) -> None:
    def since() -> float:
        return time.time() - begun

    from mqwen.engine.engine import Engine, EngineSettings
    from mqwen.engine.loading import load_artifact
    from mqwen.engine.request import Request

    imported = since()
    model, processor = load_artifact(Path(folder), gpu=device == "cuda")
    loaded = since()
    engine = Engine(model, processor, EngineSettings())
    ready = since()
    [event] = engine.generate_all([Request("one", list(range(100, 200)), max_tokens=1)])
    assert event.completion_tokens == 1
    print(
        f"{since():.1f} s; imports {imported:.1f} s, weights {loaded - imported:.1f} s, engine {ready - loaded:.1f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
