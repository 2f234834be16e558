"""llama.cpp's log: silent unless asked for, with its last error kept for our own messages."""

from __future__ import annotations

import ctypes
import re
import sys
from collections import deque
from typing import Any

from ..native import Native

WARNING, ERROR, CONTINUED = 3, 4, 5  # enum ggml_log_level


class Lines:
    """Warnings and errors, with their level."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=16)

    def take(self, about: str = "") -> str:
        """A line about something, else the oldest error (the later ones only report that it happened), "" if there was none; forgets all."""
        lines, self.lines = list(self.lines), deque(maxlen=self.lines.maxlen)
        errors = [line for level, line in lines if level == ERROR]
        return next((line for _, line in lines if about and about in line), errors[0] if errors else "")


class Log(Lines):
    """Takes over the logs of llama, ggml and mtmd, until another one does."""

    _attached: Any = None

    def __init__(self, native: Native, verbose: bool, with_mtmd: bool) -> None:
        super().__init__()
        self.verbose = verbose
        self._level = 0
        self._native, self._with_mtmd = native, with_mtmd
        self._callback = native.llama.ggml_log_callback(self._write)
        self.attach()

    def attach(self) -> None:
        """Again, where another log may have been attached since."""
        self._attach(self._callback)

    def _attach(self, callback: Any) -> None:
        Log._attached = callback  # it lives as long as the libraries may call it
        nothing = ctypes.c_void_p(0)
        self._native.llama.llama_log_set(callback, nothing)
        if self._with_mtmd:
            self._native.mtmd.mtmd_log_set(callback, nothing)
            self._native.mtmd.mtmd_helper_log_set(callback, nothing)

    def _write(self, level: int, text: bytes, _user: int | None) -> None:
        line = text.decode("utf-8", "replace")
        self._level = self._level if level == CONTINUED else level
        if self.verbose:
            sys.stderr.write(line)
            sys.stderr.flush()
        if self._level in (WARNING, ERROR) and line.strip():
            # most lines begin with the name of their C++ function
            self.lines.append((self._level, re.sub(r"^(?:\w+: )+", "", " ".join(line.split()))))
