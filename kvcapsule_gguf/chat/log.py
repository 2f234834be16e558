"""llama.cpp's log: silent unless asked for, with its last error kept for our own messages."""

from __future__ import annotations

import ctypes
import sys
from collections import deque

from ..native import Native

ERROR, CONTINUED = 3, 5  # enum ggml_log_level


class Log:
    """Takes over the logs of llama, ggml and mtmd for as long as the process lives."""

    def __init__(self, native: Native, verbose: bool, with_mtmd: bool) -> None:
        self.verbose = verbose
        self.errors: deque[str] = deque(maxlen=8)
        self._level = 0
        self._callback = native.llama.llama_log_callback(self._write)
        nothing = ctypes.c_void_p(0)
        native.llama.llama_log_set(self._callback, nothing)
        if with_mtmd:
            native.mtmd.mtmd_log_set(self._callback, nothing)
            native.mtmd.mtmd_helper_log_set(self._callback, nothing)

    def _write(self, level: int, text: bytes, _user: int | None) -> None:
        line = text.decode("utf-8", "replace")
        self._level = self._level if level == CONTINUED else level
        if self.verbose:
            sys.stderr.write(line)
            sys.stderr.flush()
        if self._level == ERROR and line.strip():
            self.errors.append(" ".join(line.split()))

    def take(self) -> str:
        """The oldest error since the last call: the later ones only report that the first one happened."""
        first = self.errors[0] if self.errors else ""
        self.errors.clear()
        return first
