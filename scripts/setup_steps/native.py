"""Builds llama.cpp's libraries (and tools) with CMake and puts them into kvcapsule_gguf/lib/."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from . import pins
from .common import LIB, LLAMA, PATCHES, ROOT, SetupError, run, say, write_if_changed

ORIGIN = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": f"{ORIGIN};{ORIGIN}/..",  # the second for lib/bin
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_COMMIT": pins.LLAMA_CPP_REV,
    "LLAMA_BUILD_NUMBER": "0",
}
# for the wheel: the variant of the CPU backend is chosen when a program starts, and nothing is needed that a Linux may lack
PORTABLE = {
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_OPENMP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",  # a wheel holds no symbolic links
} | ({f"CMAKE_{kind}_LINKER_FLAGS": "-static-libstdc++ -static-libgcc -s" for kind in ("EXE", "MODULE", "SHARED")} if sys.platform == "linux" else {})
BACKENDS = {
    "cuda": {"GGML_CUDA": "ON"},
    "metal": {"GGML_METAL": "ON", "GGML_METAL_EMBED_LIBRARY": "ON"},
    "rpc": {"GGML_RPC": "ON"},
    "vulkan": {"GGML_VULKAN": "ON"},
}
RPC_SERVER = "ggml-rpc-server"
TOOLS = ("llama-server", "llama-mtmd-cli", "llama-bench", "test-backend-ops")


def build(kind: str, *, defines: dict[str, str], tools: bool, jobs: int, digest: str) -> None:
    """Builds LLAMA/<kind>/source, kind being patched or stock, and installs the result. Raises SetupError.

    defines: CMake options of the user; they are remembered, and the stock build takes those of the patched one.
    digest: hash of the patch series, noted beside the libraries."""
    folder = LLAMA / kind
    state = _read(folder / "configured.json")
    if kind == "patched":
        defines = {**state.get("defines", {}), **defines}
    tools = tools or state.get("tools", False)  # tools once built are kept in step with the libraries
    wanted = {"root": str(ROOT), "defines": defines, "tools": tools, "options": OPTIONS}
    if state.get("root", str(ROOT)) != str(ROOT):
        shutil.rmtree(folder / "build", ignore_errors=True)  # CMake's cache holds the old place of the folder
    if state != wanted or not any((folder / "build" / name).is_file() for name in ("build.ninja", "Makefile", "ALL_BUILD.vcxproj")):
        (folder / "configured.json").unlink(missing_ok=True)
        configure(folder, "build", kind, defines, tools)
        (folder / "configured.json").write_text(json.dumps(wanted, indent=1))
    programs = [*(TOOLS if tools else ()), *([RPC_SERVER] if _rpc(defines) else ())]
    targets = ["llama"] if kind == "stock" else ["llama", "mtmd", *programs]
    first = not ((LIB / "stock" if kind == "stock" else LIB) / "build.json").is_file()
    if first:
        say(f"building llama.cpp ({kind}) with {jobs} jobs; the first time this takes minutes")
    command = ["cmake", "--build", folder / "build", "--config", "Release", "-j", str(jobs), "--target", *targets]
    run(f"building llama.cpp ({kind})", command, folder / "build.log", environment(folder))
    install(folder / "build" / "bin", LIB / "stock" if kind == "stock" else LIB, [] if kind == "stock" else programs)
    _write_manifest(LIB / "stock" if kind == "stock" else LIB, defines, digest)


def build_portable(*, jobs: int, digest: str) -> Path:
    """libllama, libmtmd, llama-server and all CPU backends, as a wheel takes them. Returns their folder. Raises SetupError."""
    folder, lib = LLAMA / "patched", LLAMA / "wheel"
    configure(folder, "wheel", "for the wheel", PORTABLE, True)
    say(f"building llama.cpp for the wheel with {jobs} jobs; with every CPU backend this takes a while")
    command = ["cmake", "--build", folder / "wheel", "-j", str(jobs), "--target", "llama", "mtmd", "llama-server"]
    run("building llama.cpp for the wheel", command, folder / "wheel.log", environment(folder))
    shutil.rmtree(lib, ignore_errors=True)
    install(folder / "wheel" / "bin", lib, ["llama-server"])
    _write_manifest(lib, PORTABLE, digest)
    return lib


def _write_manifest(lib: Path, defines: dict[str, str], digest: str) -> None:
    """What `--version` prints."""
    names = {path.name.split(".")[0].removeprefix("lib").removeprefix("ggml-") for path in lib.iterdir() if "ggml-" in path.name}
    note = {
        "llama_cpp_python": pins.LLAMA_CPP_PYTHON,
        "llama_cpp": pins.LLAMA_CPP_COMMIT,
        "patches": [path.stem for path in sorted(PATCHES.glob("*.patch"))] if digest else [],
        "series": digest,
        "backends": sorted(names - {"base"}),
        "defines": defines,
    }
    write_if_changed(lib / "build.json", json.dumps(note, indent=1).encode())


def saved_defines() -> dict[str, str]:
    return _read(LLAMA / "patched" / "configured.json").get("defines", {})


def configure(folder: Path, build: str, kind: str, defines: dict[str, str], tools: bool) -> None:
    _require_tools()
    options = dict(OPTIONS)
    options["LLAMA_BUILD_MTMD"] = "OFF" if kind == "stock" else "ON"
    for name in ("COMMON", "TOOLS", "SERVER", "TESTS"):
        needed = (tools and (name != "TESTS" or build == "build")) or (kind == "patched" and name in ("COMMON", "TOOLS") and _rpc(defines))
        options[f"LLAMA_BUILD_{name}"] = "ON" if needed else "OFF"
    if shutil.which("ccache"):
        options |= {"CMAKE_C_COMPILER_LAUNCHER": "ccache", "CMAKE_CXX_COMPILER_LAUNCHER": "ccache"}
    command: list[str | Path] = ["cmake", "-S", folder / "source", "-B", folder / build]
    if shutil.which("ninja") and not (folder / build / "CMakeCache.txt").is_file():
        command += ["-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in {**options, **defines}.items()]
    run(f"configuring llama.cpp ({kind})", command, folder / f"configure-{build}.log", environment(folder))


def _rpc(defines: dict[str, str]) -> bool:
    return defines.get("GGML_RPC", "OFF").upper() in ("ON", "1", "TRUE", "YES")


def environment(folder: Path) -> dict[str, str]:
    return {
        # no commit of this repository in the build: every commit here would rebuild there
        "GIT_CEILING_DIRECTORIES": str(folder),
        # patched and stock share the objects of the files that are equal in both
        "CCACHE_BASEDIR": str(folder),
    }


def _require_tools() -> None:
    missing = []
    if not shutil.which("cmake"):
        missing.append("CMake")
    if sys.platform != "win32" and not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        missing.append("a C++ compiler")
    if sys.platform != "win32" and not (shutil.which("ninja") or shutil.which("make")):
        missing.append("Ninja or make")
    if missing:
        hints = {"darwin": "xcode-select --install; brew install cmake ninja", "win32": "Visual Studio Build Tools with C++ and CMake"}
        hint = hints.get(sys.platform, "for example: apt install build-essential cmake ninja-build")
        raise SetupError(f"{' and '.join(missing)} not found, please install ({hint})")


def install(built: Path, lib: Path, programs: list[str]) -> None:
    """Copies libraries with their version links, and tools; equal files stay."""
    for path in sorted(built.rglob("*") if sys.platform == "win32" else built.iterdir()):
        if any(mark in path.name for mark in (".so", ".dylib", ".dll")):
            _copy(path, lib / path.name)
        elif path.name.removesuffix(".exe") in programs:
            _copy(path, (lib if sys.platform == "win32" else lib / "bin") / path.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".new")
    if source.is_symlink():
        if target.is_symlink() and os.readlink(target) == os.readlink(source):
            return
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(os.readlink(source))
    else:
        a = source.stat()
        if target.is_file() and (b := target.stat()).st_size == a.st_size and b.st_mtime_ns == a.st_mtime_ns:
            return
        shutil.copy2(source, scratch)
    # a running program keeps the file it has mapped
    os.replace(scratch, target)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
