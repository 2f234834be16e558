"""Finds the built libraries and imports llama-cpp-python on top of them.

llama-cpp-python picks its libraries while it is imported, so `load()` has to come first; afterwards `import llama_cpp` anywhere gives the same libraries.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from ..runtime.errors import KVCapsuleError
from .structs import bind

LLAMA_CPP_PYTHON = "0.3.36"  # its ctypes structs are those of the llama.cpp commit that is patched
DIRECTORY = Path(__file__).resolve().parents[1] / "lib"

_loaded: Native | None = None


class NativeError(KVCapsuleError):
    """The libraries cannot be used; the text is one line that says what to do."""


@dataclass(frozen=True)
class Native:
    """llama: the module llama_cpp.llama_cpp; directory: where its libraries are; has_capsule: they know capsules (the unpatched ones do not)."""

    llama: ModuleType
    directory: Path
    has_capsule: bool

    @cached_property
    def mtmd(self) -> ModuleType:
        """The module llama_cpp.mtmd_cpp. Raises NativeError if libmtmd was not built."""
        if not find_library(self.directory, "mtmd"):
            raise NativeError(f"no libmtmd in {self.directory}: run scripts/setup")
        return _import("llama_cpp.mtmd_cpp", self.directory)

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


def library_dir() -> Path:
    """The folder of libllama and libmtmd: KVCAPSULE_LIB, for another build of the same commit, or the one that scripts/setup fills."""
    return Path(os.environ.get("KVCAPSULE_LIB") or DIRECTORY).resolve()


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
    _check_version()
    if not find_library(directory, "llama"):
        raise NativeError(f"the llama.cpp libraries are not built (no libllama in {directory}): run scripts/setup")
    _check_foreign(directory)
    # both, always: a libmtmd from elsewhere would bring its own libllama on some systems
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(directory)
    llama = _import("llama_cpp.llama_cpp", directory)
    try:
        has_capsule = bind(llama._lib, llama.llama_model_p_ctypes, llama.llama_context_p_ctypes, llama.llama_context_params)
    except AttributeError as error:
        raise NativeError(f"the libraries in {directory} are older or newer than this package ({error}): run scripts/setup") from None
    _loaded = Native(llama, directory, has_capsule)
    return _loaded


def _check_version() -> None:
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise NativeError("llama-cpp-python is not installed in this Python: run scripts/setup and use .venv/bin/python") from None
    if found != LLAMA_CPP_PYTHON:
        raise NativeError(f"llama-cpp-python {found} is installed, KVCapsule needs exactly {LLAMA_CPP_PYTHON}: run scripts/setup and use .venv/bin/python")


def _check_foreign(directory: Path) -> None:
    for name, attribute in (("llama_cpp.llama_cpp", "_base_path"), ("llama_cpp.mtmd_cpp", "_libmtmd_base_path")):
        module = sys.modules.get(name)
        if module is not None and Path(getattr(module, attribute, "")).resolve() != directory:
            raise NativeError("llama_cpp was imported before KVCapsule and uses other libraries: call kvcapsule_gguf.native.load() before importing llama_cpp")


def _import(name: str, directory: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (AttributeError, OSError, RuntimeError) as error:
        # a missing symbol or a library of another version
        raise NativeError(f"the llama.cpp in {directory} does not fit llama-cpp-python {LLAMA_CPP_PYTHON} ({error}): run scripts/setup") from error


def find_library(directory: Path, name: str) -> Path | None:
    for candidate in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.dll"):
        if (directory / candidate).is_file():
            return directory / candidate
    return None
