"""The interactive session: questions and commands, a line each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime import interrupts
from ..runtime.errors import ContextFull, KVCapsuleError
from ..runtime.pictures import Budget, Picture, load, split_dropped, split_pasted, unquoted
from . import saved, stats
from .session import Session, Turn

HELP = """\
/image PATH   add a picture to the next question (path, http(s) or data URL)
/undo         take back the last question and its answer
/save FILE    keep the conversation, pictures and all
/load FILE    go on with a kept one
/clear        forget the conversation and its pictures
/stats        what the cache holds: tokens, slots per tier, MiB before and after
/help         this list
/exit         end (also Ctrl-D)
A picture that is dropped into the line goes with the question too."""

COMMAND = re.compile(r"/\w*(\s|$)")  # not the path of a file that was dropped


class Repl:
    """At a terminal Ctrl-C ends what is going on and comes back to the prompt; there it ends the session when it comes twice. Without one, nobody looks
    at errors: Ctrl-C ends the session, a question whose picture could not be read is not asked, and the exit status tells of every error."""

    def __init__(self, session: Session, answer: Callable[[str, list[Picture]], Turn], pending: list[Picture]) -> None:
        self.session, self.answer = session, answer
        self.pending = pending  # pictures of the next question
        self.terminal = sys.stdin.isatty()
        self.status = 0
        self._missing = False  # a picture of the next question
        self._waiting = self._hinted = False

    def run(self) -> int:
        """Reads lines from stdin until /exit or its end. Returns the exit status."""
        note("type a question, or /help")
        with interrupts.session():
            while True:
                try:
                    self._waiting = True
                    line = _read_line()
                    self._waiting = False
                    if line is None or self._do(line.strip()):
                        return self.status
                    self._hinted = False
                except KeyboardInterrupt:
                    self._interrupted()

    def _interrupted(self) -> None:
        if not self.terminal or (self._waiting and self._hinted):
            raise KeyboardInterrupt
        if not self._waiting:
            note("\ninterrupted" + (f"; {_its(self.pending)} dropped" if self.pending else ""))
            self.pending.clear()
        elif _typed():
            note("")
        else:
            self._hinted = True
            note("\n(Ctrl-C again ends the session, and so do Ctrl-D and /exit)")

    def _do(self, line: str) -> bool:
        """True when the session is to end."""
        try:
            dropped, line = ([], line) if COMMAND.match(line) else split_dropped(line)
            self._add(dropped)
            if line.startswith("/"):
                return self._command(line)
            if line and self._missing:
                self._missing = False
                self._failed("this question is not asked, because its picture is missing")
                self.pending.clear()
            elif line:
                turn = self.answer(line, self.pending)
                self.pending.clear()
                if turn.finish_reason == "interrupted" and not self.terminal:
                    raise KeyboardInterrupt
        except ContextFull as error:
            kept = f"; {_its(self.pending)} kept for the next question" if self.pending else ""
            self._failed(f"{error}{kept}")
        except KVCapsuleError as error:
            lost = "" if line.startswith("/") or not self.pending else f"; {_its(self.pending)} dropped"
            self._failed(f"{error}{lost}")
            if lost:
                self.pending.clear()
        return False

    def _failed(self, line: str) -> None:
        note(f"error: {line}")
        if not self.terminal:
            self.status = 1

    def _command(self, line: str) -> bool:
        """True when the session is to end."""
        session, pending = self.session, self.pending
        name, *found = line.split(None, 1)
        rest = found[0] if found else ""
        if name in ("/exit", "/quit"):
            return True
        if name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/clear":
            session.clear()
            pending.clear()
            self._missing = False
            note("forgotten")
        elif name == "/undo":
            question = session.undo()
            note("nothing to take back" if question is None else f"taken back: {question}")
        elif name in ("/save", "/load") and not rest:
            self._failed(f"{name} needs a file")
        elif name == "/save":
            with _file(rest) as path:
                said = saved.save(session, path, _yes if self.terminal else None)
            note(said)
        elif name == "/load":
            with _file(rest) as path:
                said = saved.load(session, path)
            note(said)
            pending.clear()
            self._missing = False
        elif name == "/stats":
            taken_back = len(session.state.images) - len(session.pictures) if session.undone else None
            print(stats.table(session.engine, session.state.images, session.state.n_cells, taken_back), file=sys.stderr)
        elif name == "/image" and rest and rest != "-":
            self._add(split_pasted(rest))
        elif name == "/image":
            self._failed("/image needs a path or URL")
        else:
            self._failed(f"unknown command {name}, see /help")
        return False

    def _add(self, sources: list[str]) -> None:
        for source in sources:
            try:
                picture = load(source, Budget.after([*self.session.pictures, *self.pending]))
            except KVCapsuleError:
                self._missing = not self.terminal
                raise
            self.pending.append(picture)
            note(f"{picture.name}: {picture.width} x {picture.height}, goes with the next question")
            if picture.warning:
                note(f"warning: {picture.warning}")


def _its(pictures: list[Picture]) -> str:
    return f"its picture{'s are' if len(pictures) > 1 else ' is'}"


def _read_line() -> str | None:
    """None at the end of the input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    if sys.stdout.isatty():
        try:
            import readline  # noqa: F401  gives input() its history and editing
        except ImportError:
            pass
    else:
        # input() would write its prompt between the answers
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        return None


def _typed() -> bool:
    """Whether there was something in the line that Ctrl-C has ended."""
    readline = sys.modules.get("readline")
    return bool(readline and readline.get_line_buffer())


@contextmanager
def _file(text: str) -> Iterator[Path]:
    """The file that `text` names. What is wrong with it is told, and the session goes on. Raises KVCapsuleError."""
    try:
        yield Path(unquoted(text)).expanduser()
    except KVCapsuleError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no such home, a loop of links, a name that is too long
        raise KVCapsuleError(f"{text}: {getattr(error, 'strerror', None) or error}") from None


def _yes(question: str) -> bool:
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
