"""Everything that the contents of a KV cache depend on, as one value: a state on disk is used only where it is equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..runtime.digest import bytes_digest
from .digest import file_digest, model_digest

VERSION = 1


def binding(model: Path, mmproj: Path | None, capsule: Path | None, settings: Mapping[str, object], libraries: Path) -> str:
    """settings: preprocessing of pictures, types of the cache, preset of the capsule, context and RoPE settings; libraries: their folder, since another
    build may compute or store differently. Raises OSError for files that cannot be read."""
    values = {
        "version": VERSION,
        "model": model_digest(model),
        "mmproj": file_digest(mmproj) if mmproj else "",
        "capsule": file_digest(capsule) if capsule else "",
        "libraries": libraries_digest(libraries),
        "settings": {name: str(value) for name, value in settings.items()},
    }
    return bytes_digest(json.dumps(values, sort_keys=True).encode())


@lru_cache
def libraries_digest(folder: Path) -> str:
    paths = {path.resolve() for name in ("llama", "mtmd", "ggml") for path in folder.glob(f"*{name}*") if path.is_file() and _is_library(path)}
    return ",".join(file_digest(path) for path in sorted(paths))


def _is_library(path: Path) -> bool:
    return ".so" in path.suffixes or path.suffix in (".dylib", ".dll")
