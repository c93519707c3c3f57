"""Pictures that a request names by https address, fetched where the operator allows it.

An address that a client chooses must not reach what only this machine can (SSRF). So: hosts by an allow-list; a host's
name is resolved once, every address that it has must be public, and the connection goes to the address that was
checked, so that a second look-up cannot give another one (rebinding); a redirect passes all of this again.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import certifi
import httpcore

from serve.errors import ApiError

REDIRECTS = 3
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HEADERS = [(b"User-Agent", b"mqwen"), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity")]


class FetchError(ValueError):
    """Why a picture was not fetched; fit for the client, so no address that a name resolved to is in it."""


async def resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class RemotePictures:
    """hosts: HOST or HOST:PORT; none means that nothing is fetched. networks: not public, and allowed all the same.

    seconds: of one picture, redirects included.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        networks: Sequence[Network] = (),
        *,
        max_bytes: int,
        seconds: float = 10,
    ) -> None:
        self._hosts = {host if ":" in host else f"{host}:443" for host in map(str.lower, hosts)}
        self._max_bytes, self._seconds = max_bytes, seconds
        trusted = ssl.create_default_context()
        trusted.load_verify_locations(certifi.where())
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=trusted,
            network_backend=_CheckedBackend(networks),
            max_connections=32,
            keepalive_expiry=5,
        )
        # The pool's own limit, and it ends first: a handshake that is merely cancelled leaves its socket open.
        self._extensions = {"timeout": {"connect": seconds / 2}}

    async def fetch(self, url: str) -> bytes:
        """Raises FetchError."""
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(REDIRECTS + 1):
                    content, location = await self._get(url)
                    if location is None:
                        return content
                    url = urljoin(url, location)
                raise FetchError(f"more than {REDIRECTS} redirects")
        except FetchError:
            raise
        except TimeoutError as error:
            raise FetchError(f"the host did not send the picture in {self._seconds:g} seconds") from error
        except Exception as error:  # whatever a host may answer, or a URL may hold
            raise FetchError("the host could not be reached, or did not answer as a web server does") from error

    async def _get(self, url: str) -> tuple[bytes, str | None]:
        """The content, or where it is redirected to."""
        host, port, target = self._checked(url)
        address = httpcore.URL(scheme=b"https", host=host.encode(), port=port, target=target)
        name = host if port == 443 else f"{host}:{port}"
        headers = [(b"Host", name.encode()), *HEADERS]
        async with self._pool.stream("GET", address, headers=headers, extensions=self._extensions) as response:
            if response.status in (301, 302, 303, 307, 308):
                return b"", next(value for name, value in response.headers if name.lower() == b"location").decode()
            if response.status != 200:
                raise FetchError(f"the host answered with status {response.status}")
            content = bytearray()
            async for part in response.aiter_stream():
                content += part
                if len(content) > self._max_bytes:
                    raise FetchError(f"the picture is larger than the limit of {self._max_bytes} bytes")
            return bytes(content), None

    def _checked(self, url: str) -> tuple[str, int, bytes]:
        """Host, port and target, taken from the URL once: what is checked here is what is asked for."""
        parts = urlsplit(url)
        if parts.scheme != "https":
            raise FetchError("only https addresses are fetched")
        if parts.username is not None or parts.password is not None:
            raise FetchError("an address with a user's name is not fetched")
        host, port = parts.hostname or "", parts.port or 443
        if not NAME.fullmatch(host) or f"{host}:{port}" not in self._hosts:
            raise FetchError("its host is not one that pictures are fetched from here; send a data URL instead")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or not target.isprintable() or " " in target:
            raise FetchError("its path holds characters that must be percent-encoded")
        return host, port, target.encode()


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, never to a name. TLS is still made for the name."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks, self._backend = networks, httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """An address that refuses, or is silent for its share of the time, is followed by the host's next."""
        addresses = [ipaddress.ip_address(found.partition("%")[0]) for found in await resolve(host, port)]
        if not addresses or not all(is_public(one) or self._allowed(one) for one in addresses):
            raise FetchError("its host does not lie in the public internet")
        *others, last = map(str, addresses)
        options["timeout"] = timeout and timeout / len(addresses)
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._backend.connect_tcp(address, port, **options)
        return await self._backend.connect_tcp(last, port, **options)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise FetchError("only https addresses are fetched")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)

    def _allowed(self, address: Address) -> bool:
        return any(address in network for network in self._networks if network.version == address.version)


def is_public(address: Address) -> bool:
    """Not private, loopback, link-local, multicast or reserved; nor an IPv6 address that carries such an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        for inner in _carried(address):
            if not is_public(inner):
                return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Mapped (::ffff:0:0/96), 6to4, Teredo, and NAT64's well-known prefix."""
    carried = [one for one in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if one]
    if address in ipaddress.ip_network("64:ff9b::/96"):
        carried.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return carried


async def fetch_all(remote: RemotePictures, pictures: Sequence[Any], fields: dict[str, str]) -> list[bytes]:
    """Each picture's bytes, the remote ones fetched at once. Raises ApiError, which names the field."""

    async def one(number: int, picture: Any) -> bytes:
        if isinstance(picture, bytes):
            return picture
        try:
            return await remote.fetch(picture.url)
        except FetchError as error:
            message = f"Picture {number + 1} is not fetched: {error}."
            raise ApiError(400, message, param=fields[f"pictures[{number}]"], code="invalid_image_url") from error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, picture)) for number, picture in enumerate(pictures)]
    except ExceptionGroup as errors:  # the first ended all others
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
