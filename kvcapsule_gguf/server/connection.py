"""One connection of a client. h11 is strict about framing; this module limits the time and the number of connections."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import RequestError

IDLE_S = 60.0  # a client may take so long for the head of a request, between requests, and until it reads more of an answer
MAX_CLIENTS = 512
MAX_OF_ONE = 256  # one address may have so many connections


class Connection(H11Protocol):
    """When there are too many connections, one without a request is closed: of the address that has most of them, the one that has been quiet longest."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch: asyncio.TimerHandle | None = None
        self._watch_for(self._expire)
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self and not one.transport.is_closing()]
        mine = [one for one in others if one.peer == self.peer]
        full = mine if len(mine) >= MAX_OF_ONE else others if len(others) >= MAX_CLIENTS else []
        if not full:
            return
        idle = [one for one in full if not one.busy]
        if idle:
            busiest = Counter(one.peer for one in full).most_common(1)[0][0]
            min(idle, key=lambda one: (one.peer != busiest, one.quiet_since)).transport.abort()
        else:
            self._say(RequestError(503, "too many connections"))

    @property
    def peer(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def busy(self) -> bool:
        """A request that is still on its way when its answer begins is a refused one."""
        return self._answering and not (self.cycle.more_body and self.cycle.response_started)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._watch_for(self._expire)
        super().on_response_complete()

    def shutdown(self) -> None:
        if self._answering and self.cycle.more_body:  # a request that is still on its way
            self.transport.abort()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        self._watch_for(self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._watch_for(self._expire)
        super().resume_writing()

    def _watch_for(self, action: Any) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self.quiet_since = self.loop.time()
        self._watch = self.loop.call_later(IDLE_S, action)

    def _expire(self) -> None:
        if not self.busy:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._say(RequestError(400, "the request is not HTTP/1.1 as it should be: its first line, a header or the framing of its body is malformed"))
        else:
            self.transport.abort()

    def _say(self, error: RequestError) -> None:
        """Writes the answer without h11, whose state may not allow one any more."""
        body = error.body()
        head = b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % (error.status, b"Bad Request" if error.status == 400 else b"Service Unavailable", len(body)) + body)
        self.transport.close()
