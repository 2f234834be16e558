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
from .lines import Lines
from .session import Session, Turn

HELP = """\
/image PATH   add a picture to the next question (path, http(s) or data URL)
/images       the pictures of the conversation, and those of the next question
/drop [N]     leave a picture out of the next question: number N of /images, or the last one
/regen        ask the last question again
/undo         take back the last question and its answer
/save FILE    keep the conversation, pictures and all
/load FILE    go on with a kept one
/clear        forget the conversation and its pictures
/stats        what the cache holds: tokens, slots per tier, MiB before and after
/help         this list
/exit         end (also Ctrl-D)
A picture that is dropped into the line goes with the question too. A line that ends with \\ goes on in the next one."""

COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)
COMMAND = re.compile(r"/\w*(\s|$)")  # not the path of a file that was dropped


class Repl:
    """At a terminal Ctrl-C ends what is going on and comes back to the prompt; there it ends the session when it comes twice. Without one, nobody looks
    at errors: Ctrl-C ends the session, a question whose picture could not be read is not asked, and the exit status tells of every error."""

    def __init__(self, session: Session, answer: Callable[[str, list[Picture]], Turn], pending: list[Picture]) -> None:
        self.session, self.answer = session, answer
        self.pending = pending  # pictures of the next question
        self.terminal = sys.stdin.isatty()
        self.lines = Lines(COMMANDS)
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
                    line = self._read()
                    self._waiting = False
                    if line is None or self._do(line.strip()):
                        return self.status
                    self._hinted = False
                except KeyboardInterrupt:
                    self._interrupted()

    def _read(self) -> str | None:
        """A line, or several where each but the last ends with a backslash; None at the end of the input."""
        lines: list[str] = []
        while (line := self.lines.read("| " if lines else "> ")) is not None:
            line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def _interrupted(self) -> None:
        if not self.terminal or (self._waiting and self._hinted):
            raise KeyboardInterrupt
        if not self._waiting:
            note("\ninterrupted" + (f"; {_its(self.pending)} dropped" if self.pending else ""))
            self.pending.clear()
        elif self.lines.typed():
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
                self._ask(line, self.pending)
                self.pending.clear()
        except ContextFull as error:
            kept = f"; {_its(self.pending)} kept for the next question" if self.pending else ""
            self._failed(f"{error}{kept}")
        except KVCapsuleError as error:
            lost = "" if line.startswith("/") or not self.pending else f"; {_its(self.pending)} dropped"
            self._failed(f"{error}{lost}")
            if lost:
                self.pending.clear()
        return False

    def _ask(self, question: str, pictures: list[Picture]) -> None:
        turn = self.answer(question, pictures)
        if turn.finish_reason == "interrupted" and not self.terminal:
            self.pending.clear()
            raise KeyboardInterrupt

    def _list(self) -> None:
        asked = self.session.pictures
        for number, picture in enumerate([*asked, *self.pending], 1):
            note(f"{number}: {picture.name}, {picture.width} x {picture.height}{', goes with the next question' if number > len(asked) else ''}")
        if not asked and not self.pending:
            note("no pictures")

    def _drop(self, which: str) -> None:
        n_asked = len(self.session.pictures)
        number = int(which) if which.isdecimal() else 0 if which else n_asked + len(self.pending)
        if not n_asked < number <= n_asked + len(self.pending):
            raise KVCapsuleError("/drop takes a picture out of the next question, by its number in /images" if self.pending else "no picture goes with the next question")
        note(f"{self.pending.pop(number - n_asked - 1).name}: left out")

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
            last = session.undo()
            note("nothing to take back" if last is None else f"taken back: {last[0]}")
        elif name == "/regen":
            with session.asked_again() as (question, pictures):
                self._ask(question, pictures)
        elif name == "/images":
            self._list()
        elif name == "/drop":
            self._drop(rest)
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
            print(stats.table(session.engine, session.state.images, session.state.n_cells, session.taken_back), file=sys.stderr)
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
