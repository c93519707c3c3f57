"""Pictures by https: from a real server over TLS where the operator allows it, and nowhere else."""

import asyncio
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve.remote import FetchError, RemotePictures, is_public
from tests.conftest import make_certificate
from tests.engine.tiny import picture

LIMIT = 100_000
LOOPBACK = [ipaddress.ip_network("127.0.0.1/32")]


NOT_PUBLIC = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fd00::1", "ff02::1"),
    *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
]


class Server(ThreadingHTTPServer):
    """asked: hosts and paths."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = make_certificate(folder, "pictures.test")
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        yield server
    server.shutdown()


class Names:
    """A resolver. asked: what it was asked for, each time."""

    def __init__(self, **addresses: list[list[str]]) -> None:
        self._addresses = {name.replace("_", "."): list(answers) for name, answers in addresses.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self._addresses[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def fetch(url: str, port: int, names: Names, networks: Any = LOOPBACK, **more: Any) -> bytes:
    """Of a server that may fetch from pictures.test and evil.test."""

    async def main() -> bytes:
        hosts = [f"pictures.test:{port}", f"evil.test:{port}", "pictures.test"]
        remote = RemotePictures(hosts, networks, max_bytes=LIMIT, resolver=names, **more)
        return await remote.fetch(url)

    return asyncio.run(main())


def test_an_allowed_picture_is_fetched(server: Server) -> None:
    port, names = server.server_port, Names(pictures_test=[["127.0.0.1"]])
    assert fetch(f"https://pictures.test:{port}/picture?size=1", port, names) == picture(1)
    assert server.asked[-1] == (f"pictures.test:{port}", "/picture?size=1")
    assert names.asked == ["pictures.test"]


def test_a_redirect_within_what_is_allowed(server: Server) -> None:
    port, names = server.server_port, Names(pictures_test=[["127.0.0.1"]])
    assert fetch(f"https://pictures.test:{port}/to?/picture", port, names) == picture(1)


REFUSED = {
    "another host": ("https://other.test:{port}/picture", "its host is not one"),
    "another port": ("https://pictures.test:1/picture", "its host is not one"),
    "no https": ("http://pictures.test:{port}/picture", "only https"),
    "a user": ("https://pictures.test@other.test:{port}/picture", "user's name"),
    "a user that looks like the host": ("https://pictures.test:{port}@127.0.0.1/", "user's name"),
    "a backslash": ("https://pictures.test:{port}\\@127.0.0.1/", "user's name|could not be reached"),
    "a trailing dot": ("https://pictures.test.:{port}/picture", "its host is not one"),
    "a longer name": ("https://pictures.test.evil.example:{port}/", "its host is not one"),
    "a name before it": ("https://xpictures.test:{port}/", "its host is not one"),
    "a null byte": ("https://pictures.test\x00.evil.example:{port}/", "its host is not one"),
    "full-width letters": ("https://ｐictures.test:{port}/", "its host is not one|could not be reached"),
    "an IPv4 address": ("https://127.0.0.1:{port}/picture", "its host is not one"),
    "a decimal host": ("https://2130706433:{port}/picture", "its host is not one"),
    "an octal host": ("https://0177.0.0.1:{port}/picture", "its host is not one"),
    "a hexadecimal host": ("https://0x7f000001:{port}/picture", "its host is not one"),
    "a short host": ("https://127.1:{port}/picture", "its host is not one"),
    "zero": ("https://0:{port}/picture", "its host is not one"),
    "IPv6 loopback": ("https://[::1]:{port}/picture", "its host is not one"),
    "IPv4 in IPv6": ("https://[::ffff:127.0.0.1]:{port}/picture", "its host is not one"),
    "a zone": ("https://[fe80::1%25eth0]:{port}/picture", "its host is not one"),
    "localhost": ("https://localhost:{port}/picture", "its host is not one"),
    "a line break in the path": ("https://pictures.test:{port}/a%0d%0a b\u2028", "percent-encoded"),
    "a redirect to loopback": (
        "https://pictures.test:{port}/to?https://127.0.0.1:{port}/picture",
        "its host is not one",
    ),
    "a redirect to http": ("https://pictures.test:{port}/to?http://pictures.test:{port}/picture", "only https"),
    "a redirect to a file": ("https://pictures.test:{port}/to?file:///etc/passwd", "only https"),
    "a redirect to another name's private address": (
        "https://pictures.test:{port}/to?https://evil.test:{port}/",
        "public",
    ),
    "redirects without end": ("https://pictures.test:{port}/to?/to?/to?/to?/to", "status 404|redirects"),
    "too large": ("https://pictures.test:{port}/endless", "larger than the limit"),
    "not there": ("https://pictures.test:{port}/nothing", "status 404"),
    "nobody there": ("https://pictures.test/picture", "could not be reached"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_fetched(server: Server, name: str) -> None:
    url, message = REFUSED[name]
    port, names = server.server_port, Names(pictures_test=[["127.0.0.1"]], evil_test=[["10.0.0.1"]])
    with pytest.raises(FetchError, match=message) as raised:
        fetch(url.format(port=port), port, names)
    assert "127.0.0.1" not in str(raised.value)
    assert "10.0.0.1" not in str(raised.value)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_with_such_an_address_is_refused(server: Server, address: str) -> None:
    port = server.server_port
    assert not is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["93.184.215.14", address]):
        before = len(server.asked)
        with pytest.raises(FetchError, match="does not lie in the public internet"):
            fetch(f"https://pictures.test:{port}/picture", port, Names(pictures_test=[addresses]), networks=[])
        assert len(server.asked) == before


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_name_that_changes_between_two_looks_is_looked_at_once(server: Server) -> None:
    """Rebinding: the first answer is checked and connected to; the second, which no one would check, is not asked."""
    port, names = server.server_port, Names(pictures_test=[["127.0.0.1"], ["169.254.169.254"]])
    assert fetch(f"https://pictures.test:{port}/picture", port, names) == picture(1)
    assert names.asked == ["pictures.test"]


def test_the_certificate_must_be_the_hosts(server: Server) -> None:
    port, names = server.server_port, Names(evil_test=[["127.0.0.1"]])
    with pytest.raises(FetchError, match="could not be reached"):
        fetch(f"https://evil.test:{port}/picture", port, names)


def test_a_host_that_does_not_answer(server: Server) -> None:
    port, names = server.server_port, Names(pictures_test=[["127.0.0.1"]])
    with pytest.raises(FetchError, match=r"did not send the picture in 0\.5 seconds"):
        fetch(f"https://pictures.test:{port}/silent", port, names, seconds=0.5)
