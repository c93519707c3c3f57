"""Traces of chosen steps, for chrome://tracing, Perfetto and pytorch.org/memory_viz.

RUN/profile/step-00000010.trace.json.gz    torch's trace of the steps up to 10
RUN/profile/step-00000010.memory.pickle    on GPUs: every allocation during them, with its stack
RUN/profile/step-00000010.memory.txt       on CPUs: what allocated how much
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile

from mqwen.storage import Location, StorageError

FOLDER = "profile"


class StepProfiler:
    """Rank 0 makes one before step `done` + 1 and calls `step` after each."""

    def __init__(self, run: Location, steps: tuple[int, ...], done: int) -> None:
        self._run, self._steps, self._done = run, set(steps), done
        self._profiler = profile(
            schedule=self._action, on_trace_ready=self._write, profile_memory=True, record_shapes=True
        )
        self._record_memory(self._action(0))
        self._profiler.start()

    def step(self) -> None:
        self._profiler.step()
        self._record_memory(self._profiler.current_action)

    def _action(self, number: int) -> ProfilerAction:
        """What to do in the `number`-th step from the start, counted from 0."""
        step = self._done + number + 1
        if step not in self._steps:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD if step + 1 in self._steps else ProfilerAction.RECORD_AND_SAVE

    def _record_memory(self, action: ProfilerAction) -> None:
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(None if action is ProfilerAction.NONE else "all")

    def _write(self, found: profile) -> None:
        name = f"step-{self._done + found.step_num:08d}"
        with tempfile.TemporaryDirectory() as local:
            files = [Path(local) / f"{name}.trace.json.gz"]
            found.export_chrome_trace(str(files[0]))
            if torch.cuda.is_available():
                files.append(Path(local) / f"{name}.memory.pickle")
                torch.cuda.memory._dump_snapshot(str(files[1]))
            else:
                files.append(Path(local) / f"{name}.memory.txt")
                files[1].write_text(found.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=40))
            for file in files:
                try:
                    (self._run / FOLDER / file.name).upload(file)
                except StorageError as error:
                    print(f"warning: a trace is lost: {error}", flush=True)  # the run goes on without it
