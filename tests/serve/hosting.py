"""A host of pictures over TLS, and of what a hostile one would send."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_certificate
from tests.engine.tiny import picture


class Host(ThreadingHTTPServer):
    """asked: hosts and paths. certificate and key: their files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.certificate, self.key = certificate, key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # Each handshake in its request's own thread: a client that has gone before it holds up no one else.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


class Handler(BaseHTTPRequestHandler):
    """/picture, /to?URL (a redirect), /endless, /silent; all else is not there."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Host)
        self.server.asked.append((self.headers["Host"], self.path))
        kind, _, argument = self.path.strip("/").partition("?")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", argument)
            self.end_headers()
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(65536))
        elif kind == "silent":
            threading.Event().wait(3)
        else:
            content = picture(1) if kind == "picture" else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client has had enough
            super().handle()


@contextmanager
def hosting(folder: Path, *names: str) -> Iterator[Host]:
    """Has these names and 127.0.0.1; its certificate is trusted meanwhile, here and in what is started."""
    host = Host(*make_certificate(folder, *names))
    threading.Thread(target=host.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(host.certificate))
        yield host
    host.shutdown()
