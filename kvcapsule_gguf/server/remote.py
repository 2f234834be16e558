"""Pictures on other servers (--remote-images): fetched here, never by llama-server, and only from public addresses."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import httpx2

from .errors import RequestError

REDIRECTS = 3
TIMEOUT_S = 15
# public by their number, but they lead to addresses that another part of them says
TUNNELS = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")]


async def fetch(url: str, most: int, hold: Callable[[int], None]) -> bytes:
    """At most `most` bytes. hold: is told of each piece by its size, and may raise RequestError. Raises RequestError."""
    try:
        return await asyncio.wait_for(_fetch(url, most, hold), TIMEOUT_S)
    except (asyncio.TimeoutError, OSError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise RequestError(400, f"the picture at {url[:80]} cannot be fetched ({' '.join(str(error).split()) or type(error).__name__})") from None


async def _fetch(url: str, most: int, hold: Callable[[int], None]) -> bytes:
    async with httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        target = httpx2.URL(url)
        for _ in range(REDIRECTS + 1):
            address = await _public_address(target)
            # to the address that was checked; another look-up could find another one
            request = client.build_request(
                "GET", target.copy_with(host=address), headers={"Host": target.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.raw_host.decode()}
            )
            reply = await client.send(request, stream=True)
            try:
                if reply.has_redirect_location:
                    target = target.join(reply.headers["Location"])
                    continue
                if reply.status_code != 200:
                    raise ValueError(f"HTTP {reply.status_code}")
                data = bytearray()
                async for piece in reply.aiter_raw():
                    hold(len(piece))
                    data += piece
                    if len(data) > most:
                        raise RequestError(413, f"the picture at {url[:80]} has more than {most >> 20} MiB")
                return bytes(data)
            finally:
                await reply.aclose()
    raise ValueError("too many redirects")


async def _public_address(url: httpx2.URL) -> str:
    """Raises ValueError, OSError."""
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise ValueError("not an http(s) URL")
    found = await asyncio.get_running_loop().getaddrinfo(url.raw_host.decode(), url.port or {"http": 80, "https": 443}[url.scheme], type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError("its address is not a public one")
    return addresses[0]


def is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_global and not address.is_multicast and not any(address.version == net.version and address in net for net in TUNNELS)
