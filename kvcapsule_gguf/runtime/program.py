"""How every program ends: exit statuses, Ctrl-C, a stdout that is closed or full, a fault of its own."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import interrupts
from .errors import KVCapsuleError
from .version import Version

ERROR = 1
FAULT = 70  # EX_SOFTWARE of sysexits.h
TRACEBACK = "KVCAPSULE_TRACEBACK"


def run(name: str, body: Callable[[], int | None]) -> int:
    """As guarded(); 130 after Ctrl-C."""
    open_streams()
    current = interrupts.Interrupts()
    try:
        with current:
            return guarded(name, body)
    except KeyboardInterrupt:
        say(current.farewell)
        return interrupts.STATUS


def guarded(name: str, body: Callable[[], int | None]) -> int:
    """Exit status: that of `body` (None = 0), 1 after an error (one line on stderr), also if stdout is closed or full, 70 after an exception that is no
    error of ours: the line says that it is a fault of the program."""
    try:
        status = body() or 0
        sys.stdout.flush()
        return status
    except Exception as error:
        interrupts.check()  # it may be the reason
        _give_up_stdout()
        said = " ".join(str(error).split())
        if isinstance(error, BrokenPipeError):
            return ERROR  # whoever read our output has seen enough
        if isinstance(error, OSError):
            said = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or said}"
        elif isinstance(error, MemoryError):
            said = f"there is not enough memory{f' ({said})' if said else ''}"
        elif not isinstance(error, KVCapsuleError):
            if os.environ.get(TRACEBACK):
                say(traceback.format_exc().rstrip())
            say(f"{name}: fault of the program, please report it: {type(error).__name__}: {said} ({TRACEBACK}=1 shows where)")
            return FAULT
        say(f"{name}: error: {said}")
        return ERROR


class Parser(argparse.ArgumentParser):
    """A flag is taken as it is written: no shortened ones, and `-st` is not `-s t`. A wrong command line ends with one line and status 2."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **{**how, "allow_abbrev": False})
        self.add_argument("--version", action=Version)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _Stdout(io.FileIO):
    """Its errors say what it is, as those of files that are opened do."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "stdout"
            raise


def open_streams() -> None:
    """Where a stream is closed from the start, its number would go to the next file that is opened. What is written to a closed stdout stays an error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (fd := os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(fd, "r" if number == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.__stdout__ in (sys.stdout, None):  # else somebody has put another one in its place
        sys.stdout.flush()
        named = io.BufferedWriter(_Stdout(1, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(named, line_buffering=sys.stdout.line_buffering, write_through=sys.stdout.write_through)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _give_up_stdout() -> None:
    """Python flushes it once more at its end, and would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """On stderr, which may be closed or full: then nobody wants to know."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass
