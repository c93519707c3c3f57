"""What the command lines of jobs/ share: an error meant for the user is one line and a non-zero exit, no trace;
progress is a line at each tenth of the way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mqwen.errors import UserError
from mqwen.storage import Location, readable


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a job's main. Exit codes: 0 done, 2 an error that the message explains, 130 or 143 stopped by a signal.

    SIGTERM ends a job as Ctrl-C does: through its `finally` blocks, which end what it started.
    """
    stopped_by = signal.SIGINT

    def stop(signum: int, frame: object) -> NoReturn:
        nonlocal stopped_by
        stopped_by = signal.Signals(signum)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background would ignore it
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + stopped_by)
    sys.exit(0)


def counter(what: str) -> Callable[[int, int], None]:
    """A progress function that prints a line at each tenth of the way, and at the end."""
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{what}: {done}/{total}", flush=True)

    return show


def uris() -> ConstructorRegistry:
    """Lets options be Locations, each given by a URI whose storage must answer."""

    def rule(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if kind.type is not Location:
            return None
        return PrimitiveConstructorSpec(1, "URI", lambda words: readable(words[0]), _is_location, lambda at: [str(at)])

    registry = ConstructorRegistry()
    registry.primitive_rule(rule)
    return registry


def _is_location(value: object) -> bool:
    return isinstance(value, Location)
