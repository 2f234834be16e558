"""The virtual environment `.venv` and the Python packages in it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from . import pins
from .common import CACHE, ROOT, VENV, SetupError, run, say

STAMP = VENV / "kvcapsule-setup.json"


def python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make() -> None:
    """Creates .venv; one that is broken (its Python was removed or upgraded away) or came along with a moved folder is made again."""
    moved = _read_stamp().get("root", str(ROOT)) != str(ROOT)
    if not moved and python().exists() and subprocess.run([python(), "-c", "import pip"], capture_output=True).returncode == 0:
        return
    say("creating .venv")
    run("python -m venv", [sys.executable, "-m", "venv", "--clear", VENV], CACHE / "log" / "venv.log")


def pip(what: str, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    command = [python(), "-m", "pip", "--disable-pip-version-check", *arguments]
    run(f"pip {what}", command, CACHE / "log" / f"pip-{what.split()[0]}.log", env)


def install(sdist: Path, train: bool, server: bool = False) -> None:
    """Installs what is missing: the requirements, llama-cpp-python without its native part, and this project, editable."""
    done = _read_stamp()
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    wanted = {
        "root": str(ROOT),
        "requirements": pins.REQUIREMENTS,
        "llama_cpp_python": pins.SDIST_SHA256,
        "project": project,
        # once there, these stay
        "train": pins.TRAIN_REQUIREMENTS if train else done.get("train", []),
        "server": pins.SERVER_REQUIREMENTS if server else done.get("server", []),
    }
    if done == wanted:
        return
    if done.get("requirements") != wanted["requirements"]:
        say(f"installing {', '.join(pins.REQUIREMENTS)}")
        pip("install", "install", *pins.REQUIREMENTS)
    if done.get("llama_cpp_python") != wanted["llama_cpp_python"]:
        say(f"installing llama-cpp-python {pins.LLAMA_CPP_PYTHON} (without its native part)")
        # its Python files only: the native libraries are ours
        pip("llama-cpp-python", "install", "--no-deps", "--force-reinstall", sdist, env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"})
    if done.get("train", []) != wanted["train"]:
        say(f"installing {', '.join(pins.TRAIN_REQUIREMENTS)}")
        pip("train", "install", *pins.TRAIN_REQUIREMENTS)
    if done.get("project") != wanted["project"]:
        say("installing kvcapsule-gguf, editable")
        pip("project", "install", "--no-deps", "-e", ROOT)
    if done.get("server", []) != wanted["server"]:
        say("installing what llama_cpp.server needs")
        try:
            pip("server", "install", *wanted["server"])
        except SetupError as error:
            # one test less: not worth stopping for; tried again next time
            say(f"{error}; the test of llama_cpp.server will be skipped")
            wanted["server"] = done.get("server", [])
    STAMP.write_text(json.dumps(wanted, indent=1))


def _read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def require_version() -> None:
    """Raises SetupError if .venv has another llama-cpp-python than the pinned one (somebody upgraded it)."""
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    found = subprocess.run([python(), "-c", code], capture_output=True, text=True).stdout.strip()
    if found != pins.LLAMA_CPP_PYTHON:
        STAMP.unlink(missing_ok=True)
        raise SetupError(f".venv has llama-cpp-python {found or 'missing'} instead of {pins.LLAMA_CPP_PYTHON}: run scripts/setup again to put it back")
