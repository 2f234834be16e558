"""The interactive session: questions and commands, a line each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import Budget, Picture, load, split_dropped, split_pasted
from . import saved, stats
from .session import Session

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


def run(session: Session, answer: Callable[[str, list[Picture]], None], pending: list[Picture]) -> int:
    """Reads lines from stdin until /exit or its end; `answer` asks and prints. Returns the exit status."""
    note("type a question, or /help")
    while (line := _read_line()) is not None:
        line = line.strip()
        try:
            dropped, line = ([], line) if COMMAND.match(line) else split_dropped(line)
            _add(session, pending, dropped)
            if _command(session, line, pending):
                return 0
            if line and not line.startswith("/"):
                answer(line, pending)
                pending.clear()
        except KVCapsuleError as error:
            lost = "" if line.startswith("/") or not pending else f"; its picture{'s are' if len(pending) > 1 else ' is'} dropped"
            note(f"error: {error}{lost}")
            if lost:
                pending.clear()
    return 0


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


def _command(session: Session, line: str, pending: list[Picture]) -> bool:
    """True when the session is to end."""
    if not line.startswith("/"):
        return False
    name, *found = line.split(None, 1)
    rest = found[0] if found else ""
    if name in ("/exit", "/quit"):
        return True
    if name == "/help":
        print(HELP, file=sys.stderr)
    elif name == "/clear":
        session.clear()
        pending.clear()
        note("forgotten")
    elif name == "/undo":
        question = session.undo()
        note("nothing to take back" if question is None else f"taken back: {question}")
    elif name in ("/save", "/load") and not rest:
        note(f"error: {name} needs a file")
    elif name == "/save":
        note(saved.save(session, Path(rest).expanduser()))
    elif name == "/load":
        note(saved.load(session, Path(rest).expanduser()))
        pending.clear()
    elif name == "/stats":
        print(stats.table(session.engine, session.state.images, session.state.n_cells), file=sys.stderr)
    elif name == "/image" and rest and rest != "-":
        _add(session, pending, split_pasted(rest))
    elif name == "/image":
        note("error: /image needs a path or URL")
    else:
        note(f"error: unknown command {name}, see /help")
    return False


def _add(session: Session, pending: list[Picture], sources: list[str]) -> None:
    for source in sources:
        picture = load(source, Budget.after([*session.pictures, *pending]))
        pending.append(picture)
        note(f"{picture.name}: {picture.width} x {picture.height}, goes with the next question")
        if picture.warning:
            note(f"warning: {picture.warning}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
