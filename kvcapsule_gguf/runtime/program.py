"""How every program ends: exit statuses, Ctrl-C, a stdout that is closed or full."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import interrupts
from .errors import KVCapsuleError

ERROR = 1


def run(name: str, body: Callable[[], int | None]) -> int:
    """Exit status: that of `body` (None = 0), 1 after an error (one line on stderr), also if stdout is closed or full, 130 after Ctrl-C."""
    _open_streams()
    current = interrupts.Interrupts()
    try:
        with current:
            try:
                status = body() or 0
                sys.stdout.flush()
                return status
            except (KVCapsuleError, ValueError) as error:
                interrupts.check()  # it may be the reason
                _say(f"{name}: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _say(current.farewell)
        return interrupts.STATUS
    except BrokenPipeError:
        pass  # whoever read our output has seen enough
    except OSError as error:
        where = error.filename or ("stdout" if error.errno == errno.EBADF else None)  # it was closed from the start
        _say(f"{name}: error: {f'{where}: ' if where else ''}{error.strerror or error}")
    _give_up_stdout()
    return ERROR


class Parser(argparse.ArgumentParser):
    """A flag is taken as it is written: no shortened ones, and `-st` is not `-s t`. A wrong command line ends with one line and status 2."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **{**how, "allow_abbrev": False})

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _open_streams() -> None:
    """Where a stream is closed from the start, its number would go to the next file that is opened. What is written to a closed stdout stays an error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (fd := os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(fd, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _give_up_stdout() -> None:
    """Python flushes it once more at its end, and would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass
