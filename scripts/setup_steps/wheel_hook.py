"""Hatch's part of the wheel: the libraries in the folder that KVCAPSULE_WHEEL_LIB names (scripts/wheel builds them and sets it) become kvcapsule_gguf/lib."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Libraries(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        folder = os.environ.get("KVCAPSULE_WHEEL_LIB")
        if not folder:
            raise SystemExit("kvcapsule-gguf holds libraries that have to be built first: run scripts/wheel")
        files = (path for pattern in ("*", "bin/*") for path in sorted(Path(folder).glob(pattern)) if path.is_file())
        build_data["force_include"] = {str(path): f"kvcapsule_gguf/lib/{path.relative_to(folder).as_posix()}" for path in files}
        build_data["pure_python"] = False
        # the libraries are called by ctypes: any Python 3 on this platform
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
