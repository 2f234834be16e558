"""One thread at a time: a llama_context is not made for two, and only a crash or a wrong answer would tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Alone:
    """Who uses an object: a thread inside a call, or, between its parts, a stream and the thread that has read it last. Other threads are refused. A new
    request of the same thread ends the stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = self._depth = 0  # of the calls that are going on
        self._stream: object | None = None  # stands for it: the stream itself would keep the object alive
        self._reader = 0

    @contextmanager
    def call(self, ends_stream: bool = True, during_stream: bool = False) -> Iterator[bool]:
        """Yields whether this is the outermost call. during_stream: also while another thread has a stream that it is not reading. Raises RuntimeError."""
        me, begun = threading.get_ident(), False
        try:
            with self._lock:
                outermost = not self._depth
                if self._reader != me and self._stream is not None and not during_stream if outermost else self._thread != me:
                    raise RuntimeError("this Llama is answering another thread, or has a stream open there: use a lock around its calls and streams, or one Llama for each thread")
                if outermost and ends_stream:
                    self._stream = None
                self._thread, self._depth, begun = me, self._depth + 1, True
            yield outermost
        finally:
            if begun:
                self._depth -= 1

    def run(self, work: Callable[[], Any], **how: bool) -> Any:
        """What `work` returns; if that is a stream, one that counts until it ends, is closed or is dropped. how: as in call()."""
        with self.call(**how) as outermost:
            answer = work()
            return _Stream(answer, self) if outermost and isinstance(answer, Iterator) else answer

    @contextmanager
    def part(self, stream: object) -> Iterator[None]:
        with self.call(ends_stream=False, during_stream=True):
            if self._stream is not stream:
                raise RuntimeError("this Llama has answered another request since, or is closed: a stream must be finished or closed first")
            self._reader = threading.get_ident()
            yield

    def begin(self) -> object:
        self._stream, self._reader = object(), threading.get_ident()
        return self._stream

    def end(self, stream: object | None = None) -> None:
        """None: whichever there is."""
        if stream in (None, self._stream):
            self._stream = None


class _Stream(Generator):
    def __init__(self, chunks: Iterator[Any], alone: Alone) -> None:
        self._chunks, self._alone = chunks, alone
        self._mark = alone.begin()

    def send(self, value: Any) -> Any:
        return self._part(lambda: next(self._chunks) if value is None else self._chunks.send(value))  # type: ignore[attr-defined]

    def throw(self, *error: Any) -> Any:
        return self._part(lambda: self._chunks.throw(*error))  # type: ignore[attr-defined]

    def _part(self, step: Callable[[], Any]) -> Any:
        with self._alone.part(self._mark):
            try:
                return step()
            except BaseException:
                self._alone.end(self._mark)
                raise

    def close(self) -> None:
        self._alone.end(self._mark)
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    __del__ = close


def alone(method: Callable[..., Any], **how: bool) -> Callable[..., Any]:
    """The same method, for objects with an Alone as `_alone`. how: as in Alone.call()."""

    @wraps(method)
    def guarded(self: Any, *arguments: Any, **options: Any) -> Any:
        return self._alone.run(lambda: method(self, *arguments, **options), **how)

    return guarded
