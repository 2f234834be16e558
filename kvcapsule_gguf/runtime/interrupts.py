"""Ctrl-C, the same way in all programs.

Python raises KeyboardInterrupt between its own instructions only, and one that it raises inside a callback of native code is printed and lost. So a
thread counts the signals. It tells native code to stop, and makes the main thread raise KeyboardInterrupt, again and again until that was not inside a
callback. Where native code does not stop in time, the thread ends the process.

Native code stops where `stoppable()` was told about its parameters: while a model is loaded, a picture encoded, a batch decoded.
Outside of `Interrupts`, and in other threads than the main one, nothing here has an effect.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STATUS = 130  # of a process that Ctrl-C has ended, as shells report it
LIMIT_S, SESSION_S = 0.2, 1.0  # for native code to stop: before the process is ended, or a session is told
AGAIN_S = 0.02
NODES = 8  # of a projector's graph, between two looks

# native code looks without the interpreter's lock: it stops when strlen(_stop) is not 0
_stop = ctypes.create_string_buffer(2)
_strlen = (ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)).strlen
_callbacks: dict[type, Any] = {}  # they must outlive the library's use of them
_nodes = 0

_WAKE = getattr(signal, "SIGURG", signal.SIGINT)  # programs that do not know this signal ignore it; Windows has none to spare
_current: Interrupts | None = None


class Interrupts:
    """While it is entered, Ctrl-C raises KeyboardInterrupt in the main thread. Where the signal is ignored (nohup) it stays so.

    farewell: the line to print when the process has to be ended; session: then it is only ended when Ctrl-C comes a second time; guest: the program is
    somebody else's, it is never ended, and a handler of its own stays."""

    def __init__(self, guest: bool = False) -> None:
        self.guest = guest
        self.farewell = ""
        self.session = False
        self._lock = threading.RLock()
        self._owed = 0  # KeyboardInterrupts that are still to be raised
        self._unanswered = False  # by a KeyboardInterrupt
        self._deferred = 0

    def __enter__(self) -> Interrupts:
        global _current
        handler = signal.getsignal(signal.SIGINT)
        wanted = handler is signal.default_int_handler if self.guest else handler != signal.SIG_IGN
        self._active = _current is None and threading.current_thread() is threading.main_thread() and wanted
        if not self._active:
            return self
        self._main = threading.get_ident()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, _WAKE)}
        _current = self
        return self

    def __exit__(self, *exception: Any) -> None:
        global _current
        if not self._active:
            return
        self._deferred = 1
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        self._write.close()
        with self._lock:
            self._owed, _stop[0] = 0, b"\0"
        _current = None
        self._watcher.join()  # whoever counts threads, does not count this one
        if self._unanswered and (exception[0] is None or issubclass(exception[0], Exception)):
            raise KeyboardInterrupt from None  # an error may be no more than native code that stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Called by Python in the main thread, between two instructions; the thread may not have counted the signal yet."""
        self._unanswered |= number == signal.SIGINT
        if number != _WAKE:
            return  # input() looks at signals again after an exception, and none may be left then: so only the last one raises
        while frame is not None and frame.f_code is not Interrupts._unraisable.__code__:
            frame = frame.f_back
        if frame is None:  # it would be lost for good in there
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if one is owed."""
        with self._lock:
            if not self._owed or self._deferred:
                return
            self._owed -= 1
            self._unanswered = False
            if not self._owed:
                _stop[0] = b"\0"
        raise KeyboardInterrupt

    def _unraisable(self, what: Any) -> None:
        if what.exc_type is not KeyboardInterrupt:
            self._hook(what)
            return
        # raised in a callback, or while an object was deleted, and dropped by Python
        with self._lock:
            self._owed += 1
            self._unanswered = True
        self._write.send(b"\0")

    def _watch(self) -> None:
        start, late = 0.0, False
        while data := self._receive():
            if signal.SIGINT in data:
                if late and not self.guest:
                    end(self.farewell)
                with self._lock:
                    if not self._owed:
                        self._owed, start = 1, time.monotonic()
            if not self._owed:
                late = False
                continue
            if time.monotonic() - start > (SESSION_S if self.session else LIMIT_S) and not late and not self.guest:
                if not self.session:
                    end(self.farewell)
                late = True
                os.write(2, b"\nstopping (Ctrl-C again ends the program)\n")
            self._wake()
            with self._lock:
                if self._owed:
                    _stop[0] = b"\1"
        self._read.close()

    def _receive(self) -> bytes:
        """Numbers of signals, or 0s; nothing when all is over."""
        try:
            if owed := self._owed:
                time.sleep(AGAIN_S)
            self._read.setblocking(not owed)
            return self._read.recv(64)
        except BlockingIOError:
            return b"\0"

    def _wake(self) -> None:
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(self._main, _WAKE)  # it ends a wait for input, too
        else:
            _thread.interrupt_main(_WAKE)


def end(farewell: str = "") -> None:
    """Ends the process at once."""
    try:
        os.write(2, f"\n{farewell}\n".encode() if farewell else b"\n")
    finally:
        os._exit(STATUS)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C has come: for places where native code may have stopped because of it."""
    if (current := _here()) is not None:
        current.check()


@contextmanager
def deferred() -> Iterator[None]:
    """What is done inside is done whole, KeyboardInterrupt comes afterwards. For moments."""
    if (current := _here()) is None:
        yield
        return
    current._deferred += 1
    try:
        yield
    finally:
        current._deferred -= 1


@contextmanager
def session() -> Iterator[None]:
    """What is in memory is worth more than half a second: native code that does not stop is waited for, until Ctrl-C comes again."""
    if (current := _here()) is None:
        yield
        return
    current.session = True
    try:
        yield
    finally:
        current.session = False


def farewell(line: str) -> None:
    """Sets what is printed if the process has to be ended."""
    if (current := _here()) is not None:
        current.farewell = line


def stoppable(params: Any) -> Any:
    """Ctrl-C stops what is done with these llama_model_params, llama_context_params or mtmd_context_params. Returns them."""
    if threading.current_thread() is not threading.main_thread():
        return params  # Ctrl-C is not for it
    types = dict(params._fields_)
    if "progress_callback" in types:
        params.progress_callback = _callback(types["progress_callback"], lambda progress, data: not _stop.value)
    if "abort_callback" in types:
        params.abort_callback = ctypes.cast(_strlen, types["abort_callback"])
        params.abort_callback_data = ctypes.cast(_stop, ctypes.c_void_p)
    elif "cb_eval" in types:
        params.cb_eval = _callback(types["cb_eval"], _look)
    return params


def stoppable_context(llama: Any, ctx: int) -> None:
    """The same for a llama_context that is there already. llama: libllama (native.Library)."""
    if threading.current_thread() is threading.main_thread():
        llama.llama_set_abort_callback(ctx, ctypes.cast(_strlen, llama.ggml_abort_callback), ctypes.cast(_stop, ctypes.c_void_p))


def _look(tensor: int, ask: bool, data: int | None) -> bool:
    """ggml_backend_sched_eval_callback: the graph is computed in parts, and not to its end when it has to stop."""
    global _nodes
    if not ask:
        # what is left half computed is no error for llama.cpp: never in a thread that does not get the KeyboardInterrupt
        return not _stop.value or threading.current_thread() is not threading.main_thread()
    _nodes += 1
    return _nodes % NODES == 0


def _callback(kind: type, function: Any) -> Any:
    return _callbacks.setdefault(kind, kind(function))


def _here() -> Interrupts | None:
    return _current if _current is not None and threading.get_ident() == _current._main else None
