"""Ctrl-C while native code runs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

GRACE_S = 1.0


class Interrupt:
    """Python raises KeyboardInterrupt only between its own instructions. A picture can keep the library busy for long, so a thread waits: if the
    main thread has not come back from native code a moment after Ctrl-C, it ends the process with the usual status."""

    def __enter__(self) -> Interrupt:
        self._active = threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._seen = False
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._handler = signal.signal(signal.SIGINT, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        signal.signal(signal.SIGINT, self._handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()

    def _on_signal(self, *_: object) -> None:
        self._seen = True
        raise KeyboardInterrupt

    def _watch(self) -> None:
        while self._read.recv(1):
            deadline = time.monotonic() + GRACE_S
            while not self._seen and time.monotonic() < deadline:
                time.sleep(0.05)
            if not self._seen:
                sys.stderr.write("\n")
                os._exit(130)
            self._seen = False
