"""What llama.cpp prints in a process with several Llamas in several threads: its log for verbose=True, nothing for verbose=False."""

from __future__ import annotations

import logging
import threading
from collections import deque
from functools import lru_cache
from typing import Any

from llama_cpp._logger import logger
from llama_cpp._utils import suppress_stdout_stderr

from .. import native
from ..chat.log import Log
from ..native.library import find_library

say = logging.getLogger("kvcapsule_gguf").warning  # one line on stderr, unless the program sets logging up in another way


class ThreadLog(Log):
    """Errors are kept for the thread in which they happen. `verbose` is llama-cpp-python's: one setting for the process, the last Llama made sets it."""

    _kept = threading.local()
    ended = False

    lines = property(lambda self: self._kept.__dict__.setdefault("lines", deque(maxlen=16)), lambda self, lines: setattr(self._kept, "lines", lines))
    _level = property(lambda self: self._kept.__dict__.setdefault("level", 0), lambda self, level: setattr(self._kept, "level", level))
    verbose = property(lambda self: logger.level <= logging.DEBUG, lambda self, value: None)  # type: ignore[assignment]

    def _write(self, level: int, text: bytes, _user: int | None) -> None:
        if not self.ended:
            super()._write(level, text, _user)


@lru_cache
def log() -> ThreadLog:
    """Of the process. llama-cpp-python's own knows the levels of an older llama.cpp, and nothing of mtmd."""
    libraries = native.load()
    return ThreadLog(libraries, False, find_library(libraries.directory, "mtmd") is not None)


def keep_descriptors() -> None:
    """llama-cpp-python points stdout and stderr of the whole process at /dev/null while it loads; two threads at once leave them there. The log above
    makes that needless."""
    nothing: Any = lambda self, *exception: None  # noqa: E731
    suppress_stdout_stderr.__enter__ = suppress_stdout_stderr.__exit__ = nothing
