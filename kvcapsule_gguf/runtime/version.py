"""Where the libraries are, and what `--version` prints of them and of the package."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .. import __version__

DIRECTORY = Path(__file__).resolve().parents[1] / "lib"
MANIFEST = "build.json"  # scripts/setup_steps/native.py writes it


def library_dir() -> Path:
    """The folder of libllama and libmtmd: KVCAPSULE_LIB, for another build of the same commit, or the one that comes with the package."""
    return Path(os.environ.get("KVCAPSULE_LIB") or DIRECTORY).resolve()


def version() -> str:
    """Some lines: package, llama.cpp with its patches, backends, folder."""
    folder = library_dir()
    try:
        note: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        patches = note.get("patches", [])
        lines = [
            f"llama.cpp {note['llama_cpp'][:9]} (of llama-cpp-python {note['llama_cpp_python']}) with {len(patches)} patches, series {note['series'][:12] or 'none'}",
            *(f"  {name}" for name in patches),
            f"backends: {', '.join(note.get('backends', ()))}",
        ]
    except (OSError, ValueError, KeyError):
        lines = ["libraries without a manifest"]
    return "\n".join([f"kvcapsule-gguf {__version__}", *lines, f"libraries: {folder}"])


class Version(argparse.Action):
    """--version"""

    def __init__(self, option_strings: list[str], dest: str, **how: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the versions of the package and of llama.cpp, its patches and backends")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()
