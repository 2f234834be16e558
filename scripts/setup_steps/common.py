"""Folders, messages and processes shared by the steps."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from . import pins

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
PATCHES = ROOT / "patches"
LIB = ROOT / "kvcapsule_gguf" / "lib"
LLAMA = CACHE / f"llama.cpp-{pins.LLAMA_CPP_REV}"  # patched/ and stock/, each with source/ and build/


class SetupError(Exception):
    """Ends setup with its text, one line."""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_if_changed(path: Path, data: bytes) -> bool:
    """Leaves an equal file alone, so that its mtime, and what was built from it, stays valid."""
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    scratch.write_bytes(data)
    os.replace(scratch, path)
    return True


def run(what: str, command: list[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
    """Runs a command, its output to `log` (and to the terminal, if there is one). Raises SetupError with the log's last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stderr.isatty()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        assert process.stdout is not None
        while piece := process.stdout.read1(1 << 16):
            file.write(piece)
            if live:
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
    if process.wait() != 0:
        if not live:
            tail = log.read_text(errors="replace").splitlines()[-30:]
            print("\n".join(tail), file=sys.stderr)
        raise SetupError(f"{what} failed (exit {process.returncode}), full output in {log.relative_to(ROOT) if log.is_relative_to(ROOT) else log}")
