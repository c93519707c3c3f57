"""How often Ray Data's scheduler looks for work. It needs no torch: the scheduler and every reading task import it."""

from __future__ import annotations

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.05  # seconds
WORTH_A_LOOK = 4  # rows, or tasks to start


class Pace(ExecutionCallback):
    """Ray Data's scheduler looks again at once while readers wait for room; on a small machine that costs a core.

    A look takes milliseconds, and all rows that have come since the last one. So it waits until there are some: longer
    where it found few, less where it found many.
    """

    def __init__(self) -> None:
        self._done, self._pause = 0, SHORTEST_PAUSE

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        metrics = [operator.metrics for operator in executor._topology]
        done = sum(metric.num_tasks_submitted + metric.num_task_outputs_generated for metric in metrics)
        longer = done - self._done < WORTH_A_LOOK
        self._pause = min(LONGEST_PAUSE, 1.5 * self._pause) if longer else max(SHORTEST_PAUSE, self._pause / 1.5)
        self._done = done
        time.sleep(self._pause)
