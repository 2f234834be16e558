"""llama.cpp's API in ctypes for llama_process.py, as `L`: llama-cpp-python's, or what `scripts/bindings --all` made of the headers of a llama.cpp that
llama-cpp-python does not fit. KVCAPSULE_TEST_API names that file, LLAMA_CPP_LIB_PATH the folder of the libraries."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvcapsule_gguf.native.library import find_library

__all__ = ["L"]


def _made(file: Path, folder: Path) -> SimpleNamespace:
    declared: dict[str, Any] = {}
    exec(file.read_text(), declared)
    lib = ctypes.CDLL(str(find_library(folder, "llama")))
    api = SimpleNamespace(**declared, _lib=lib, llama_log_callback=declared["ggml_log_callback"])
    for name, (result, arguments) in declared["LLAMA"].items():
        if hasattr(lib, name):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            setattr(api, name, function)
    for handle in ("model", "context", "adapter_lora"):
        setattr(api, f"llama_{handle}_p_ctypes", ctypes.c_void_p)
    return api


L: Any
if file := os.environ.get("KVCAPSULE_TEST_API"):
    L = _made(Path(file), Path(os.environ["LLAMA_CPP_LIB_PATH"]))
else:
    import llama_cpp.llama_cpp as L
