"""The lines of a session: read from a pipe, or typed at a terminal with editing, completion and a history that outlives the session."""

from __future__ import annotations

import contextlib
import os
import sys
from glob import escape, glob
from pathlib import Path
from typing import Any

KEPT = 1000  # lines of history


class Lines:
    """commands: what a word that begins with / may become."""

    def __init__(self, commands: list[str]) -> None:
        self._commands = commands
        self._readline: Any = None
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline

                self._readline = readline
                self._start()

    def read(self, prompt: str) -> str | None:
        """None at the end of the input."""
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        if not sys.stdout.isatty():
            # input() would write its prompt between the answers
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if sys.stdout.isatty() else "")
        except EOFError:
            return None
        self._keep()
        return line

    def typed(self) -> bool:
        """Whether there was something in the line that Ctrl-C has ended."""
        return bool(self._readline and self._readline.get_line_buffer())

    def _start(self) -> None:
        readline = self._readline
        readline.set_completer_delims("")  # a name may have any character
        readline.set_completer(lambda _, n: [*self._completions(readline.get_line_buffer()), None][n])
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        readline.set_history_length(KEPT)
        with contextlib.suppress(OSError):
            readline.read_history_file(history_file())

    def _completions(self, line: str) -> list[str]:
        command, space, path = line.partition(" ")
        if not space:
            return [name for name in self._commands if name.startswith(line)] if line.startswith("/") else []
        if command not in ("/image", "/save", "/load"):
            return []
        found = sorted(glob(escape(os.path.expanduser(path)) + "*"))
        return [f"{command} {name}{os.sep if os.path.isdir(name) else ''}" for name in found]

    def _keep(self) -> None:
        """After each line, since a session may end in any way."""
        if self._readline is not None:
            with contextlib.suppress(OSError):
                path = history_file()
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._readline.write_history_file(path)
                path.chmod(0o600)


def history_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvcapsule" / "history"
