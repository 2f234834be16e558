"""HTTP in front of llama-server: keys, limits, errors as JSON, streams passed on as they come. uvicorn and h11 do the framing, httpx the inner side."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from ..runtime.pictures import is_remote
from . import body as json_body
from .caps import check_caps
from .connection import IDLE_S, Connection
from .endpoints import finder
from .errors import RequestError, repaired
from .launch import Upstream
from .media import Limits, prepare
from .remote import fetch

BODY_S = 120.0  # a body must be complete by then
PIECE_S = 20.0  # the next part of a body must come by then
REST_BYTES = 256 << 20  # of a body that is refused, so many are still read, and dropped
TEXT_BYTES = 8 << 20  # a request may have so much beside its pictures: no context holds more
TEXT_COPIES = 12  # llama-server makes so many copies of a text
SHORT_BYTES = 1 << 20  # a text up to this size is not counted
ROOM_BYTES = 1 << 30  # pixels and long texts of all requests whose answers have not begun may take so much
READS, CHECKS = 4, 2  # the JSON of so many requests, and the pictures of so many, are worked on at a time: this bounds memory
RETRY_S = 5
TO_LLAMA = {"accept", "accept-encoding", "user-agent", "origin", "if-none-match", "access-control-request-method", "access-control-request-headers", "last-event-id"}
NOT_TO_CLIENT = {"connection", "keep-alive", "transfer-encoding", "server", "date", "content-length"}
ONCE = {"host", "content-length", "content-type", "content-encoding", "transfer-encoding", "authorization", "x-api-key", "origin"}
JSON_KINDS = {"application/json", "text/json", "text/plain", "application/x-www-form-urlencoded"}  # the last is what curl says when nobody tells it
PRIVATE_NAMES = (".local", ".localhost", ".internal", ".lan", ".home", ".home.arpa", ".test")  # nobody can own such a name on the internet

Headers = dict[str, str]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Room:
    """An estimate of the bytes that pixels and long texts take, in files and in llama-server. A request that needs more than is left waits."""

    def __init__(self) -> None:
        self._free = ROOM_BYTES
        self._changed = asyncio.Condition()

    async def take(self, size: int) -> int:
        """Returns the bytes that `give` has to get back."""
        size = min(size, ROOM_BYTES)
        async with self._changed:
            await self._changed.wait_for(lambda: size <= self._free)
            self._free -= size
        return size

    async def give(self, size: int) -> None:
        self._free += size
        async with self._changed:
            self._changed.notify_all()


@dataclass
class Taken:
    """A request holds these until its answer begins. room: bytes for its pixels and text; held: bytes of its body and of what was fetched for it."""

    files: list[Path] = field(default_factory=list)
    room: int = 0
    held: int = 0


class Left(Exception):
    """The client went away."""


class Body:
    """Of a request, as it comes."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self._more = True

    async def pieces(self) -> AsyncIterator[bytes]:
        """Those that have not been read. Raises RequestError, Left."""
        end = asyncio.get_running_loop().time() + BODY_S
        while self._more:
            try:
                message = await asyncio.wait_for(self.receive(), min(PIECE_S, max(0, end - asyncio.get_running_loop().time())))
            except asyncio.TimeoutError:
                raise RequestError(408, "the request did not arrive in time") from None
            if message["type"] == "http.disconnect":
                raise Left
            self._more = message["more_body"]
            yield message["body"]

    async def drop(self) -> None:
        """Reads what is left, up to a limit: a client that is still sending sees no answer if its connection is closed."""
        left = REST_BYTES
        with suppress(RequestError, Left):
            async for piece in self.pieces():
                left -= len(piece)
                if left < 0:
                    return


class Gateway:
    """The front as a thread of its own, from `start` to `drain`."""

    def __init__(self, address: tuple[str, int], upstream: Upstream, limits: Limits, api_keys: list[str]) -> None:
        """Raises OSError when the address cannot be used."""
        self._socket = socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=128)
        self.server_address = self._socket.getsockname()[:2]
        self._front = Front(upstream, limits, api_keys, address[0])
        for name in ("uvicorn", "asyncio"):  # they would log what clients do wrong, and clients are told by the answer
            logger = logging.getLogger(name)
            logger.addHandler(logging.NullHandler())
            logger.propagate = False
        self._server = uvicorn.Server(
            uvicorn.Config(self._front, http=Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False, server_header=False, date_header=False,
                           proxy_headers=False, timeout_keep_alive=int(IDLE_S))
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Takes no new requests, and waits until the running ones have ended. Returns False if that took too long."""
        self._server.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]
        self._server.should_exit = True
        self._thread.join(seconds + 10)
        return not self._front.cut


class Front:
    """The ASGI application."""

    def __init__(self, upstream: Upstream, limits: Limits, api_keys: list[str], host: str) -> None:
        self.upstream, self.limits, self.api_keys, self.host = upstream, limits, api_keys, host
        self.cut = False  # the server has ended before an answer was complete
        self._held = 0  # bytes of all bodies, and of what was fetched for them
        self._room = Room()
        self._reads, self._checks = asyncio.Semaphore(READS), asyncio.Semaphore(CHECKS)
        self._llama = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=str(upstream.socket), limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)),
            base_url="http://localhost", timeout=None, trust_env=False
        )

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = Body(receive)
        try:
            async with self._taken() as taken:
                await self._answer(scope, body, send, taken)
        except RequestError as error:
            waits = any(name.lower() == b"expect" for name, _ in scope["headers"])  # nobody knows then whether the body will follow
            await _answer_with(send, error.status, error.body(), close=waits, before_end=body.drop)
        except Left:
            pass
        except asyncio.CancelledError:
            self.cut = True
            raise
        except httpx2.HTTPError:
            raise  # an answer that llama-server broke off: uvicorn ends the connection
        except Exception as error:  # a fault of this program, which uvicorn answers with 500
            self.upstream.say(f"error: {scope['method']} {scope['raw_path'].decode()[:80]} failed in the front: {error!r}")
            raise

    async def _answer(self, scope: dict[str, Any], body: Body, send: Send, taken: Taken) -> None:
        headers = _single(scope["headers"])
        method, path = scope["method"], scope["raw_path"].decode()
        if method not in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
            raise RequestError(405 if method in ("PUT", "PATCH") else 501, f"{method} is not taken here")
        if len(scope["raw_path"]) + len(scope["query_string"]) > 8192:
            raise RequestError(414, "the path is too long")
        self._refuse_web_pages(headers)
        if method in ("GET", "HEAD") and path in ("/health", "/v1/health"):
            ready = self.upstream.ready
            return await _answer_with(send, 200 if ready else 503, b'{"status":"ok"}' if ready else RequestError(503, "Loading model").body())
        allowed = self._allowed(headers)
        if method in ("POST", "DELETE") and not allowed:
            raise RequestError(401, "Invalid API Key")
        parcel: list[bytes] = []
        if method == "POST":
            find = finder(path)
            _check_kind(headers)
            self._check_length(headers)
            try:
                data = bytearray()
                async for piece in body.pieces():
                    self._hold(taken, len(piece))
                    data += piece
                parcel = [bytes(data)]
                del data
                parcel = [await self._checked(parcel, find, taken)]
            finally:
                self._held -= taken.held
        await self._unless_left(body.receive, self._forward(scope, headers, parcel, taken, allowed, send))

    # --- the request ---

    def _allowed(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        return not self.api_keys or any([hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in self.api_keys])  # noqa: C419 (all are compared, whichever fits)

    def _refuse_web_pages(self, headers: Headers) -> None:
        """Without a key, no web page may use this server. A page could point its own name at this address, or ask from its own origin: both are refused."""
        if self.api_keys:
            return
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
        if "." in name and name != self.host and not name.endswith(PRIVATE_NAMES) and not _is_address(name):
            raise RequestError(403, f"without --api-key this server is not used under the name {name[:80]}, which a web page could have: give it a key, or use its address")
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            raise RequestError(403, "without --api-key this server is not used by web pages of other servers: give it a key")

    def _check_length(self, headers: Headers) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            raise RequestError(400, "Content-Length and Transfer-Encoding exclude each other")
        length = int(headers.get("content-length", 0))  # h11 has seen that it is a number
        if length > self.limits.body_bytes:
            raise RequestError(413, f"the request has {length / 2**20:.1f} MiB, at most {self.limits.body_bytes >> 20} are taken")

    def _hold(self, taken: Taken, size: int) -> None:
        """Raises RequestError."""
        taken.held += size
        self._held += size
        if taken.held > self.limits.body_bytes:
            raise RequestError(413, f"the request, with what is fetched for it, has more than {self.limits.body_bytes >> 20} MiB")
        if self._held > 4 * self.limits.body_bytes:
            raise RequestError(503, "too many large requests at once")

    async def _checked(self, parcel: list[bytes], find: Any, taken: Taken) -> bytes:
        """Returns the body that llama-server gets. Raises RequestError."""
        async with self._reads:
            request, media, text = await asyncio.to_thread(_read, parcel.pop(), find, self.limits)
        if not media:
            taken.room = await self._room.take(text)
            return json_body.written(request)
        files: list[bytes | None] = []
        for medium in media:
            if is_remote(medium.text) and not self.limits.remote_images:
                raise RequestError(400, "pictures from other servers are not fetched here: send them as data: URLs (the server's --remote-images allows them)")
            files.append(await fetch(medium.text, self.limits.pictures.file_bytes, partial(self._hold, taken)) if is_remote(medium.text) else None)
        async with self._checks:
            body, needs = await asyncio.to_thread(_write, request, list(zip(media, files)), self.limits, self.upstream, taken.files)
            taken.room = await self._room.take(needs + text)  # the next requests wait for CHECKS meanwhile, and their pictures are not unpacked yet
            return body

    @asynccontextmanager
    async def _taken(self) -> AsyncIterator[Taken]:
        taken = Taken()
        try:
            yield taken
        finally:
            await self._let_go(taken)

    async def _let_go(self, taken: Taken) -> None:
        while taken.files:
            taken.files.pop().unlink(missing_ok=True)
        size, taken.room = taken.room, 0
        await self._room.give(size)

    # --- the answer ---

    async def _unless_left(self, receive: Receive, work: Any) -> None:
        """When the client goes away, the inner connection is closed, and llama-server ends its work. Raises Left then."""
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Left
            working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _forward(self, scope: dict[str, Any], headers: Headers, parcel: list[bytes], taken: Taken, allowed: bool, send: Send) -> None:
        if not self.upstream.ready:
            raise RequestError(503, "Loading model")
        inner = {name: value for name, value in headers.items() if name in TO_LLAMA}
        if allowed:
            inner["authorization"] = f"Bearer {self.upstream.token}"
        if parcel:
            inner |= {"content-type": "application/json", "content-length": str(len(parcel[0]))}
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = self._llama.build_request(scope["method"], "/", headers=inner, content=_emptied(parcel) if parcel else None, extensions={"target": target})
        started = events = False
        try:
            reply = await self._llama.send(request, stream=True)
            try:
                await self._let_go(taken)  # llama-server has read the pictures
                data = None
                if reply.status_code >= 400 and "content-length" in reply.headers:
                    data = await reply.aread()
                    if error := repaired(reply.status_code, reply.headers.get("content-type", ""), data):
                        raise error
                events = reply.headers.get("content-type", "").startswith("text/event-stream")
                started = True
                await send({"type": "http.response.start", "status": reply.status_code, "headers": self._to_client(reply)})
                if data is None:
                    async for piece in reply.aiter_raw():
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": data or b""})
            finally:
                await reply.aclose()
        except httpx2.HTTPError as fault:
            error = await self._broken(fault)
            if not started:
                raise error from None
            if events:  # this tells a client that the answer is not complete
                await send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n", "more_body": True})
            raise  # other clients see that the end is missing

    def _to_client(self, reply: httpx2.Response) -> list[tuple[bytes, bytes]]:
        kept = [(name.lower(), value) for name, value in reply.headers.raw if name.decode().lower() not in NOT_TO_CLIENT]
        if not self.api_keys:
            kept = [(name, value) for name, value in kept if not name.startswith(b"access-control-")]
        if "content-length" in reply.headers:
            kept.append((b"content-length", reply.headers["content-length"].encode()))
        return kept

    async def _broken(self, fault: Exception) -> RequestError:
        for _ in range(10):
            if self.upstream.process.poll() is not None or not self.upstream.ready:
                return RequestError(503, "llama-server ended in the middle of this request and is started again: try again, or ask for less")
            await asyncio.sleep(0.05)
        return RequestError(502, f"llama-server broke off ({fault!r})")


def _read(body: bytes, find: Any, limits: Limits) -> tuple[Any, list[Any], int]:
    """Returns the request, its media, and the bytes of room that its text needs. Raises RequestError."""
    request = json_body.parse(body)
    if not isinstance(request, dict):
        return request, [], 0  # a list of adapters; llama-server refuses it elsewhere
    check_caps(request)
    media = list(find(request))
    if len(media) > limits.pictures.count:
        raise RequestError(413, f"the request has {len(media)} pictures, at most {limits.pictures.count} are taken")
    text = len(body) - sum(len(medium.text) for medium in media)
    if text > TEXT_BYTES:
        raise RequestError(413, f"the request has {text / 2**20:.1f} MiB beside its pictures, at most {TEXT_BYTES >> 20} are taken")
    return request, media, TEXT_COPIES * text if text > SHORT_BYTES else 0


def _write(request: Any, media: list[Any], limits: Limits, upstream: Upstream, made: list[Path]) -> tuple[bytes, int]:
    needs = prepare(media, limits, upstream.media, made, upstream.say)
    return json_body.written(request), needs


def _single(raw: list[tuple[bytes, bytes]]) -> Headers:
    """Raises RequestError when a header of ONCE is there twice."""
    headers: Headers = {}
    for name, value in raw:
        text = name.decode("latin-1").lower()
        if text in headers and text in ONCE:
            raise RequestError(400, f"the header {text} is there twice")
        headers[text] = f"{headers[text]}, {value.decode('latin-1')}" if text in headers else value.decode("latin-1")
    return headers


def _check_kind(headers: Headers) -> None:
    """Every body is read as JSON, so one that says it is something else is refused. Raises RequestError."""
    message = Message()
    message["Content-Type"] = headers.get("content-type", "application/json")
    kind = message.get_content_type()
    if (kind not in JSON_KINDS and not kind.endswith("+json")) or (message.get_content_charset() or "utf-8") not in ("utf-8", "us-ascii"):
        raise RequestError(415, "the request must be application/json in UTF-8")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "compressed requests are not taken")


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return False


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body of a GET, which nobody asked for


async def _emptied(parcel: list[bytes]) -> AsyncIterator[bytes]:
    """Frees the body as soon as it is sent, and not only when the answer is complete."""
    yield parcel.pop()


async def _answer_with(send: Send, status: int, body: bytes, close: bool = False, before_end: Callable[[], Awaitable[None]] | None = None) -> None:
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_S).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if before_end is not None:
        await before_end()
    await send({"type": "http.response.body", "body": b""})
