"""Finds the built libraries and loads them.

llama-cpp-python, which the Python API and its own server need, picks its libraries while it is imported, so `load()` has to come first; afterwards
`import llama_cpp` anywhere gives the same libraries.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runtime.errors import KVCapsuleError
from ..runtime.version import library_dir
from . import header

LLAMA_CPP_PYTHON = "0.3.36"  # the one whose ctypes structs are those of the llama.cpp commit that is patched

_loaded: Native | None = None


class NativeError(KVCapsuleError):
    """The libraries cannot be used; the text is one line that says what to do."""


class Library:
    """The functions of a shared library, and the types and constants of the headers. Raises NativeError."""

    def __init__(self, path: Path, *tables: Mapping[str, tuple[Any, Any]]) -> None:
        """tables: of header.py, (result type, argument types) by name."""
        try:
            lib = ctypes.CDLL(str(path))
            for name, (result, arguments) in ((name, types) for table in tables for name, types in table.items()):
                function = getattr(lib, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (AttributeError, OSError) as error:  # a missing symbol, or no library at all
            raise NativeError(f"the libraries in {path.parent} are older or newer than this package ({error}): run scripts/setup") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(header, name)


@dataclass(frozen=True)
class Native:
    """llama: libllama; directory: where the libraries are; has_capsule: they know capsules (the unpatched ones do not)."""

    llama: Library
    directory: Path
    has_capsule: bool

    @cached_property
    def mtmd(self) -> Library:
        """Raises NativeError if libmtmd was not built."""
        path = find_library(self.directory, "mtmd")
        if path is None:
            raise NativeError(f"no libmtmd in {self.directory}: run scripts/setup")
        return Library(path, header.MTMD)

    @cached_property
    def ggml_base(self) -> ctypes.CDLL:
        """Of ggml itself. Raises NativeError."""
        path = find_library(self.directory, "ggml-base")
        if path is None:
            raise NativeError(f"no libggml-base in {self.directory}: run scripts/setup")
        return ctypes.CDLL(str(path))

    def require_capsule(self) -> None:
        if not self.has_capsule:
            raise NativeError(f"the llama.cpp in {self.directory} has no capsules (it is not patched): run scripts/setup")


def load(directory: Path | None = None) -> Native:
    """Loads the libraries once per process; without a folder, those that are loaded already, or library_dir(). Raises NativeError."""
    global _loaded
    if _loaded is not None and directory is None:
        return _loaded
    directory = Path(directory).resolve() if directory else library_dir()
    if _loaded is not None:
        if _loaded.directory != directory:
            raise NativeError(f"llama.cpp is loaded from {_loaded.directory} already, it cannot be loaded from {directory} too")
        return _loaded
    path = find_library(directory, "llama")
    if path is None:
        raise NativeError(f"the llama.cpp libraries are not built (no libllama in {directory}): run scripts/setup")
    _check_foreign(directory)
    # both, always: a libmtmd from elsewhere would bring its own libllama on some systems
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(directory)
    has_capsule = hasattr(ctypes.CDLL(str(path)), "llama_capsule_load_from_file")
    _loaded = Native(Library(path, header.LLAMA, header.CAPSULE if has_capsule else {}), directory, has_capsule)
    return _loaded


def llama_cpp() -> ModuleType:
    """The module llama_cpp.llama_cpp on these libraries. Raises NativeError without the llama-cpp-python that fits them."""
    directory = load().directory
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise NativeError('this needs llama-cpp-python: pip install "kvcapsule-gguf[llama-cpp-python]"') from None
    if found != LLAMA_CPP_PYTHON:
        raise NativeError(f"llama-cpp-python {found} is installed, KVCapsule needs exactly {LLAMA_CPP_PYTHON}: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}")
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (AttributeError, OSError, RuntimeError) as error:
        raise NativeError(f"the llama.cpp in {directory} does not fit llama-cpp-python {LLAMA_CPP_PYTHON} ({error}): run scripts/setup") from error


def _check_foreign(directory: Path) -> None:
    for name, attribute in (("llama_cpp.llama_cpp", "_base_path"), ("llama_cpp.mtmd_cpp", "_libmtmd_base_path")):
        module = sys.modules.get(name)
        if module is not None and Path(getattr(module, attribute, "")).resolve() != directory:
            raise NativeError("llama_cpp was imported before KVCapsule and uses other libraries: call kvcapsule_gguf.native.load() before importing llama_cpp")


def find_library(directory: Path, name: str) -> Path | None:
    for candidate in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.dll"):
        if (directory / candidate).is_file():
            return directory / candidate
    return None
