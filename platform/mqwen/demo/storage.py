"""Where the demo keeps what its stages write: its own folder, or a bucket of an S3 server that ends with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import boto3

from mqwen.demo.serving import HOST
from mqwen.demo.stages import StageError, end_group

START_LIMIT = 60.0  # seconds
BUCKET = "mqwen-demo"

Storage = Literal["folder", "s3"]


@contextmanager
def stored(kind: Storage, out: Path) -> Iterator[str]:
    """The URI under which the stages write, for the time of the block. This process' environment says how to reach it.

    Raises StageError where the server does not start.
    """
    if kind == "folder":
        yield str(out)
        return
    with s3_server(out / "s3.log") as address:
        # Nothing of the user's own settings may win over these. Any keys will do: moto asks for some and checks none.
        keys = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_REGION": "us-east-1"}
        os.environ.update({"AWS_ENDPOINT_URL_S3": address, **keys})
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """A moto_server on a free port of loopback; yields its URL. It keeps all in memory."""
    command = [str(Path(sys.executable).parent / "moto_server"), "--host", HOST, "--port", "0"]
    with log.open("w") as output:
        # In a session of its own, as the stages: it must outlive the terminal's Ctrl-C, and ends last.
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield _address(server, log)
    finally:
        end_group(server)


def _address(server: subprocess.Popen, log: Path) -> str:
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit and server.poll() is None:
        if found := re.search(rf"Running on (http://{HOST}:\d+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise StageError(f"moto_server did not start. It said:\n{log.read_text()[-2000:]}")
