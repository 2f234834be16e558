"""HTTP in front of llama-server: keys, limits, errors as JSON, streams passed on as they come."""

from __future__ import annotations

import hmac
import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .errors import RequestError, repaired
from .launch import Upstream
from .media import Limits, checked

HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "authorization", "x-api-key", "expect"}
IDLE_S = 75.0  # a client that sends or takes nothing for so long is gone
MAX_CLIENTS = 512
PIECE = 1 << 16


class Gateway(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], upstream: Upstream, limits: Limits, api_keys: list[str]) -> None:
        """Raises OSError when the address cannot be used."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.upstream, self.limits, self.api_keys = upstream, limits, api_keys
        self.draining = False
        self._active = 0
        self._clients = threading.Semaphore(MAX_CLIENTS)
        self._idle = threading.Condition()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._clients.acquire(blocking=False):
            body = RequestError(503, "too many connections").body()
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a connection that broke; what goes wrong in a request is answered there

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._idle:
            self._active += 1
        try:
            yield
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def drain(self, seconds: float) -> bool:
        """Takes nothing new, and waits until what is running has ended; False if that took too long."""
        self.draining = True
        self.shutdown()
        self.socket.close()
        with self._idle:
            return self._idle.wait_for(lambda: self._active == 0, seconds)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "kvcapsule-server", ""
    timeout = IDLE_S
    disable_nagle_algorithm = True

    def answer(self) -> None:
        with self.server.working():
            try:
                self._answer()
            except RequestError as error:
                self._refuse(error)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_HEAD = answer

    def _answer(self) -> None:
        if self.server.draining:
            raise RequestError(503, "the server is shutting down")
        allowed = self._allowed()
        if self.command in ("POST", "PUT") and not allowed:
            raise RequestError(401, "Invalid API Key")
        body = self._body()
        if body and self.command in ("POST", "PUT") and "multipart" not in self.headers.get("Content-Type", ""):
            body = checked(body, self.server.limits)
        connection = UnixConnection(str(self.server.upstream.socket))
        try:
            self._forward(connection, body, allowed)
        except (ConnectionRefusedError, FileNotFoundError):
            raise RequestError(503, "Loading model" if self.server.upstream.process.poll() is None else "llama-server has ended") from None
        except http.client.HTTPException as error:
            self._broken(f"llama-server broke off ({error!r})")
        finally:
            connection.close()

    # --- the request ---

    def _allowed(self) -> bool:
        keys = self.server.api_keys
        given = self.headers.get("Authorization", "").removeprefix("Bearer ") or self.headers.get("X-Api-Key", "")
        return not keys or any([hmac.compare_digest(given.encode(), key.encode()) for key in keys])

    def handle_expect_100(self) -> bool:
        self._length()  # too large is said before it is sent
        return super().handle_expect_100()

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "0").strip()
        if not text.isascii() or not text.isdigit():
            raise RequestError(400, "Content-Length is not a number")
        if int(text) > self.server.limits.body_bytes:
            raise RequestError(413, f"the request has {int(text) / 2**20:.1f} MiB, at most {self.server.limits.body_bytes >> 20} are taken")
        return int(text)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._chunked()
        length = self._length()
        body = self.rfile.read(length) if length else b""
        if len(body) != length:
            raise ConnectionResetError
        return body

    def _chunked(self) -> bytes:
        body = bytearray()
        while True:
            try:
                size = int(self.rfile.readline(64).split(b";")[0], 16)
            except ValueError:
                raise RequestError(400, "the chunks of the request are malformed") from None
            if size < 0 or len(body) + size > self.server.limits.body_bytes:
                raise RequestError(413, f"the request has more than {self.server.limits.body_bytes >> 20} MiB")
            if size == 0:
                while self.rfile.readline(8192).strip():
                    pass
                return bytes(body)
            body += self.rfile.read(size)
            self.rfile.readline(8)

    # --- the answer ---

    def _forward(self, connection: UnixConnection, body: bytes, allowed: bool) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        if allowed:
            headers["Authorization"] = f"Bearer {self.server.upstream.token}"
        connection.request(self.command, self.path, body or None, headers)
        if not self._wait(connection.sock):
            self.close_connection = True
            return  # closing our end cancels the work over there
        reply = connection.getresponse()
        length = reply.getheader("Content-Length")
        if reply.status >= 400 and length is not None:
            data = reply.read()
            if error := repaired(reply.status, reply.getheader("Content-Type", ""), data):
                raise error
            self._head(reply, len(data))
            self.wfile.write(data)
        elif length is not None or self.command == "HEAD" or reply.status in (204, 304):
            self._head(reply, int(length or 0))
            while piece := reply.read(PIECE):
                self.wfile.write(piece)
        else:
            self._head(reply, None)
            while piece := reply.read1(PIECE):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")

    def _wait(self, upstream: socket.socket) -> bool:
        """Until llama-server answers; False if the client went away before."""
        watched = [self.connection, upstream]
        while True:
            ready, _, _ = select.select(watched, [], [], 60)
            if upstream in ready:
                return True
            if self.connection in ready:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    return False
                watched = [upstream]  # the next request is there already

    def _head(self, reply: http.client.HTTPResponse, length: int | None) -> None:
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP | {"server", "date"}:
                self.send_header(name, value)
        self._end_head(length)

    def _end_head(self, length: int | None) -> None:
        self._sent = True
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        if self.server.draining:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _broken(self, text: str) -> None:
        if not getattr(self, "_sent", False):
            raise RequestError(502, text)
        self.close_connection = True  # mid-stream: the missing end tells the client

    def _refuse(self, error: RequestError) -> None:
        body = error.body()
        self.close_connection = True  # the rest of the request may still be on its way
        try:
            self.send_response(error.status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self._end_head(len(body))
            if self.command != "HEAD":
                self.wfile.write(body)
            self._discard()
        except OSError:
            pass

    def _discard(self) -> None:
        """Takes what the client is still sending, for a moment: one that cannot write does not read the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(2)
        end = time.monotonic() + 5
        while time.monotonic() < end and self.connection.recv(PIECE):
            pass

    def handle_one_request(self) -> None:
        self._sent = False
        try:
            super().handle_one_request()
        except RequestError as error:  # from handle_expect_100
            self._refuse(error)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses."""
        self.command = getattr(self, "command", None) or "GET"
        self.request_version = "HTTP/1.1"  # until the first line is read it stands at 0.9, which has no headers
        self._refuse(RequestError(code, message or "malformed request"))

    def log_message(self, *_: object) -> None:
        pass
