"""Pictures by https: from a real host over TLS where the operator allows it, and nowhere else."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from serve.backend import Served
from serve.ingress import Policy, create_app
from serve.remote import FetchError, RemotePictures, is_public
from serve.task import ChatTask, Chunk
from tests.engine.tiny import picture
from tests.serve.hosting import Host, hosting

LIMIT = 100_000
LOOPBACK = (ipaddress.ip_network("127.0.0.1/32"),)
NAMES = ("pictures.test", "changing.test")  # of the host
ALLOWED = (*NAMES, "private.test", "other.test")  # by the operator


NOT_PUBLIC = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fd00::1", "ff02::1"),
    *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("tls"), *NAMES) as host:
        yield host


class Names:
    """Stands for the system's resolver. asked: what it was asked for, each time.

    A name has one list of addresses after the other, and the last one from then on.
    """

    def __init__(self, **addresses: list[list[str]]) -> None:
        self._addresses = {name.replace("_", "."): list(answers) for name, answers in addresses.items()}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        answers = self._addresses[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(None, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]


class Shown:
    """A backend that keeps the pictures that reach it."""

    def __init__(self) -> None:
        self.pictures: list[bytes] = []

    async def generate(self, task: ChatTask) -> AsyncGenerator[Chunk]:
        self.pictures += task.pictures
        yield Chunk("done", "stop", 1, 1)


def ask(url: str, port: int, names: Names, networks: Any = LOOPBACK) -> tuple[httpx.Response, list[bytes]]:
    """The API's answer to a chat with this picture, and the pictures that came through."""
    hosts = (*(f"{name}:{port}" for name in ALLOWED), "pictures.test")
    policy = Policy(None, 1 << 20, 4, max_picture_bytes=LIMIT, picture_hosts=hosts, picture_networks=networks)
    shown = Shown()
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(create_app({"shown": Served(shown)}, policy))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "shown", "messages": [{"role": "user", "content": content}]}
            return await client.post("/v1/chat/completions", json=body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", names)
        return asyncio.run(main()), shown.pictures


def check_fetched(url: str, port: int, names: Names, networks: Any = LOOPBACK) -> None:
    response, pictures = ask(url, port, names, networks)
    assert response.status_code == 200, response.text
    assert pictures == [picture(1)]


def check_refused(url: str, port: int, names: Names, networks: Any = LOOPBACK) -> str:
    """The reason, as the client gets it."""
    response, pictures = ask(url, port, names, networks)
    assert response.status_code == 400, response.text
    assert pictures == []
    error = response.json()["error"]
    assert error["message"].startswith("Picture 1 is not fetched: ")
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_image_url")
    assert error["param"] == "messages[0].content[1].image_url.url"
    for address in ("127.0.0.1", "10.0.0.1", "169.254.169.254"):
        assert address not in response.text
    return str(error["message"])


def test_an_allowed_picture_is_fetched(host: Host) -> None:
    port, names = host.server_port, Names(pictures_test=[["127.0.0.1"]])
    check_fetched(f"https://pictures.test:{port}/picture?size=1", port, names)
    assert host.asked[-1] == (f"pictures.test:{port}", "/picture?size=1")
    assert names.asked == ["pictures.test"]


def test_a_redirect_within_what_is_allowed(host: Host) -> None:
    port, names = host.server_port, Names(pictures_test=[["127.0.0.1"]])
    check_fetched(f"https://pictures.test:{port}/to?/picture", port, names)


def test_an_address_that_does_not_answer_is_followed_by_the_next(host: Host) -> None:
    port, names = host.server_port, Names(pictures_test=[["::1", "127.0.0.1"]])
    check_fetched(f"https://pictures.test:{port}/picture", port, names, (*LOOPBACK, ipaddress.ip_network("::1/128")))


def test_an_address_that_is_silent_is_followed_by_the_next(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full drops who comes next, as a firewall does."""
    monkeypatch.setattr(socket, "getaddrinfo", Names(pictures_test=[["127.0.0.2", "127.0.0.1"]]))
    name, networks = f"pictures.test:{host.server_port}", (ipaddress.ip_network("127.0.0.0/8"),)
    remote = RemotePictures([name], networks, max_bytes=LIMIT, seconds=4)
    with socket.socket() as silent, socket.socket() as queued:
        silent.bind(("127.0.0.2", host.server_port))
        silent.listen(0)
        queued.connect(silent.getsockname())
        assert asyncio.run(remote.fetch(f"https://{name}/picture?size=1")) == picture(1)


REFUSED = {
    "another host": ("https://another.test:{port}/picture", "its host is not one"),
    "another port": ("https://pictures.test:1/picture", "its host is not one"),
    "a user": ("https://pictures.test@another.test:{port}/picture", "user's name"),
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
        "https://pictures.test:{port}/to?https://private.test:{port}/",
        "public",
    ),
    "a redirect to a name that has another address by then": (
        "https://changing.test:{port}/to?https://changing.test:{port}/picture",
        "public",
    ),
    "redirects without end": ("https://pictures.test:{port}/to?/to?/to?/to?/to", "status 404|redirects"),
    "another host's certificate": ("https://other.test:{port}/picture", "could not be reached"),
    "too large": ("https://pictures.test:{port}/endless", "larger than the limit"),
    "not there": ("https://pictures.test:{port}/nothing", "status 404"),
    "nobody there": ("https://pictures.test/picture", "could not be reached"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_fetched(host: Host, name: str) -> None:
    url, reason = REFUSED[name]
    port = host.server_port
    names = Names(
        pictures_test=[["127.0.0.1"]],
        changing_test=[["127.0.0.1"], ["169.254.169.254"]],
        private_test=[["10.0.0.1"]],
        other_test=[["127.0.0.1"]],
    )
    assert re.search(reason, check_refused(url.format(port=port), port, names))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_with_such_an_address_is_refused(host: Host, address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["93.184.215.14", address]):
        before, names = len(host.asked), Names(pictures_test=[addresses])
        reason = check_refused(f"https://pictures.test:{host.server_port}/picture", host.server_port, names, ())
        assert "does not lie in the public internet" in reason
        assert len(host.asked) == before


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_name_that_changes_between_two_looks_is_looked_at_once(host: Host) -> None:
    """Rebinding: the first answer is checked and connected to; the second, which no one would check, is not asked."""
    port, names = host.server_port, Names(pictures_test=[["127.0.0.1"], ["169.254.169.254"]])
    check_fetched(f"https://pictures.test:{port}/picture", port, names)
    assert names.asked == ["pictures.test"]


def test_a_host_that_does_not_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names(pictures_test=[["127.0.0.1"]]))
    url = f"https://pictures.test:{host.server_port}"
    remote = RemotePictures([url.removeprefix("https://")], LOOPBACK, max_bytes=LIMIT, seconds=0.5)
    with pytest.raises(FetchError, match=r"did not send the picture in 0\.5 seconds"):
        asyncio.run(remote.fetch(f"{url}/silent"))


def test_a_host_that_shakes_no_hands_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names(pictures_test=[["127.0.0.1"]]))

    async def main(silent: socket.socket) -> None:
        host = f"pictures.test:{silent.getsockname()[1]}"
        remote = RemotePictures([host], LOOPBACK, max_bytes=LIMIT, seconds=1)
        with pytest.raises(FetchError, match="could not be reached"):
            await remote.fetch(f"https://{host}/picture")
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(5)
            while await asyncio.to_thread(connection.recv, 4096):  # its first words, and then the end
                pass

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asyncio.run(main(silent))
