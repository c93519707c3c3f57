"""An HTTP server between a client and another one, which can be told to fail."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import urlsplit

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Faulty:
    """`url` stands for the server behind it. `refuse_every` n answers 503 to each n-th request; while `down` is set
    every request's connection is closed without an answer; while `mute` is set they wait for it to be cleared.
    `cut_every` n ends each n-th answer in the middle of its body; `slow` seconds pass in the middle of each."""

    def __init__(self, behind: str) -> None:
        self.refuse_every, self.requests, self.refused = 0, 0, 0
        self.cut_every, self.cut, self.slow = 0, 0, 0.0
        self.down, self._goes_on = False, threading.Event()
        self._goes_on.set()
        self._numbers = count(1)
        faulty, host = self, urlsplit(behind).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                faulty.requests = next(faulty._numbers)
                faulty._goes_on.wait()
                if faulty.down:
                    faulty.refused += 1
                    self.close_connection = True
                    return
                if faulty.refuse_every and faulty.requests % faulty.refuse_every == 0:
                    faulty.refused += 1
                    self.reply(503, [("Content-Type", "application/xml")], BUSY)
                    return
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                dropped = ("transfer-encoding", "connection", "content-length")
                headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
                self.reply(answer.status, headers, answer.read(), answer.getheader("Content-Length", ""))
                connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def reply(
                self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                half = len(body) // 2
                self.wfile.write(body[:half])
                if half and faulty.cut_every and faulty.requests % faulty.cut_every == 0:
                    faulty.cut += 1
                    self.close_connection = True
                    return
                if half and faulty.slow:
                    self.wfile.flush()
                    time.sleep(faulty.slow)
                self.wfile.write(body[half:])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def mute(self) -> Iterator[None]:
        self._goes_on.clear()
        try:
            yield
        finally:
            self._goes_on.set()

    @contextmanager
    def serving(self) -> Iterator["Faulty"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
