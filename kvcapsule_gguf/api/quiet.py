"""What llama.cpp prints in a process with several Llamas in several threads: its log for verbose=True, nothing for verbose=False."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llama_cpp._logger import llama_log_callback, logger
from llama_cpp._utils import suppress_stdout_stderr

from .. import native
from ..chat.log import Lines, Log
from ..native.library import find_library
from ..runtime import interrupts

say = logging.getLogger("kvcapsule_gguf").warning  # one line on stderr, unless the program sets logging up in another way
info = logging.getLogger("kvcapsule_gguf").info


class Said(Lines):
    """What llama.cpp says in one thread, in one call of reasons()."""

    level = 0


class ThreadLog(Log):
    """Errors go to the call of reasons() in whose thread they happen, and elsewhere nowhere. `verbose` is llama-cpp-python's: one setting for the process,
    the last Llama made sets it."""

    lines = property(lambda self: _said().lines, lambda self, lines: setattr(_said(), "lines", lines))
    _level = property(lambda self: _said().level, lambda self, level: setattr(_said(), "level", level))
    verbose = property(lambda self: logger.level <= logging.DEBUG, lambda self, value: None)

    def detach(self) -> None:
        """Python is no longer called, since a KeyboardInterrupt that comes while it is would be printed and lost: llama.cpp prints by itself, or calls a
        function of the C library that does nothing."""
        kind = type(self._callback)
        self._attach(kind() if self.verbose else ctypes.cast(_libc.abs, kind))


_here = threading.local()
_lock = threading.Lock()
_inside = 0  # calls of reasons(), in all threads
_libc = ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)


def _said() -> Said:
    return getattr(_here, "said", None) or Said()


@lru_cache
def log() -> ThreadLog:
    """Of the process. llama-cpp-python's own knows the levels of an older llama.cpp, and nothing of mtmd."""
    libraries = native.load()
    return ThreadLog(libraries, False, find_library(libraries.directory, "mtmd") is not None)


@contextmanager
def reasons() -> Iterator[Said]:
    """The log of what is done inside, in this thread. A KeyboardInterrupt that comes meanwhile is raised at the end."""
    global _inside
    lost: list[Any] = []
    hook = sys.unraisablehook
    # no other thread gets one, and Interrupts sees to it where it is entered
    in_main = threading.current_thread() is threading.main_thread() and interrupts._here() is None
    if in_main:
        sys.unraisablehook = lambda what: lost.append(None) if what.exc_type is KeyboardInterrupt else hook(what)
    outer, _here.said = getattr(_here, "said", None), Said()
    with _lock:
        _inside += 1
        log().attach()
    try:
        yield _here.said
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                log().detach()
        _here.said = outer
        if in_main:
            sys.unraisablehook = hook
    if lost:
        raise KeyboardInterrupt


def keep_descriptors() -> None:
    """llama-cpp-python points stdout and stderr of the whole process at /dev/null while it loads; two threads at once leave them there. Its log, for mtmd
    as well, makes that needless."""
    nothing: Any = lambda self, *exception: None  # noqa: E731
    for name in ("__enter__", "__exit__"):
        setattr(suppress_stdout_stderr, name, nothing)
    log()._attach(llama_log_callback)
