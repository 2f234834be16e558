"""Compiles a harness and the few sources that it needs with AddressSanitizer and UndefinedBehaviorSanitizer; only what changed is compiled again."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HARNESSES = ROOT / "tests" / "fuzz"
OUT = ROOT / ".cache" / "fuzz"

GGML = ("ggml/src/ggml.c", "ggml/src/ggml-quants.c", "ggml/src/ggml-threading.cpp", "ggml/src/gguf.cpp")
LOADER = (
    "src/capsule/format/reader.cpp", "src/capsule/format/tables.cpp", "src/capsule/format/header.cpp", "src/capsule/util/sha256.cpp",
    "ggml/src/ggml-capsule/layout.cpp",
)  # fmt: skip
# target -> sources of llama.cpp's tree; the harness is tests/fuzz/<target>.cpp
TARGETS = {
    "capsule": (*GGML, "src/llama-impl.cpp", *LOADER),
    "state": ("src/capsule/store/state.cpp",),
    "print_capsule": (*GGML, "src/llama-impl.cpp", *LOADER),
}
# targets that need all of libllama: the other objects and ggml are those of the ordinary build
IN_LIBRARY = {"context": ("src/capsule/*/*.cpp", "src/llama-context.cpp", "src/llama-kv-cache.cpp")}
PROGRAMS = ("print_capsule",)  # with a main() of their own

SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
VERSION_H = '#pragma once\n#define GGML_VERSION "fuzz"\n#define GGML_COMMIT "fuzz"\n'  # CMake makes one from git
PLAIN = ["-O0"]  # for what is linked but never runs
NEVER_RUNS = ("ggml-quants.c",)
INCLUDES = ("include", "src", "ggml/include", "ggml/src")


class FuzzError(Exception):
    """Ends the command with its text, one line."""


@dataclass(frozen=True)
class Compiler:
    c: str
    cxx: str
    libfuzzer: bool

    @property
    def name(self) -> str:
        return "libFuzzer" if self.libfuzzer else "standalone driver"


@cache
def find_compiler() -> Compiler:
    """clang with libFuzzer, else any compiler with the sanitizers. Raises FuzzError."""
    for c, cxx in (("clang", "clang++"), (os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++"))):
        if not shutil.which(c) or not shutil.which(cxx):
            continue
        for libfuzzer in ((True, False) if "clang" in cxx else (False,)):
            if _links(cxx, libfuzzer):
                return Compiler(c, cxx, libfuzzer)
    raise FuzzError("no compiler with sanitizers found: install clang (libFuzzer), or g++ with libasan and libubsan")


def _links(cxx: str, libfuzzer: bool) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text('#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const unsigned char *, size_t) { return 0; }\n'
                          + ("" if libfuzzer else "int main() { return 0; }\n"))
        flags = ["-fsanitize=address,undefined" + (",fuzzer" if libfuzzer else "")]
        return subprocess.run([cxx, *flags, source, "-o", source.with_suffix("")], capture_output=True).returncode == 0


def build(target: str, tree: Path, compiler: Compiler, library: Path | None = None) -> Path:
    """The program of a target. `tree`: llama.cpp's sources with the patch series on them; `library`: its CMake build. Raises FuzzError."""
    if not (tree / "src" / "capsule" / "hooks.h").is_file():
        raise FuzzError(f"no patched llama.cpp in {tree}: run scripts/setup --no-build, or give --source")
    fuzzer = compiler.libfuzzer and target not in PROGRAMS
    folder = OUT / ("libfuzzer" if fuzzer else "plain") / Path(compiler.cxx).name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ggml-version.h").is_file():
        (folder / "ggml-version.h").write_text(VERSION_H)
    if target in IN_LIBRARY:
        sources = sorted(path for pattern in IN_LIBRARY[target] for path in tree.glob(pattern))
        others, link_flags = _library(sources, library)
    else:
        sources = [tree / name for name in TARGETS[target]]
        others, link_flags = [], []
    if GGML[0] in TARGETS.get(target, ()):
        sources.append(HARNESSES / "unreached.cpp")
    sources.append(HARNESSES / f"{target}.cpp")
    if not fuzzer and target not in PROGRAMS:
        sources.append(HARNESSES / "driver.cpp")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda source: _compile(source, tree, folder, compiler, fuzzer), sources)) + others
    program = folder / target
    if not program.is_file() or program.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        link = [compiler.cxx, *SANITIZE, *(["-fsanitize=fuzzer"] if fuzzer else []), *objects, *link_flags, "-o", program, "-lpthread", "-lm"]
        _run(link, f"linking {target}")
    return program


def _library(sources: list[Path], library: Path | None) -> tuple[list[Path], list[str]]:
    """The objects of libllama but those of `sources`, and the flags that link ggml."""
    folder = (library or Path()) / "src" / "CMakeFiles" / "llama.dir"
    made = {f"{source.name}.o" for source in sources}
    objects = [path for path in sorted(folder.rglob("*.o")) if path.name not in made]
    if library is None or not objects:
        raise FuzzError(f"no objects of libllama in {folder}: run scripts/setup, or give --library")
    bin_folder = library / "bin"
    return objects, [f"-L{bin_folder}", f"-Wl,-rpath,{bin_folder}", "-lggml", "-lggml-cpu", "-lggml-base", "-ldl"]


def _compile(source: Path, tree: Path, folder: Path, compiler: Compiler, fuzzer: bool) -> Path:
    checks = PLAIN if source.name in NEVER_RUNS else [*SANITIZE, *(["-fsanitize=fuzzer-no-link"] if fuzzer else [])]
    command = [compiler.c if source.suffix == ".c" else compiler.cxx, *checks]
    command += ["-std=c11"] if source.suffix == ".c" else ["-std=c++17"]
    command += ["-D_GNU_SOURCE", *(f"-I{tree / name}" for name in INCLUDES), f"-I{HARNESSES}", f"-I{folder}", "-w", "-c", str(source)]
    target = folder / f"{source.name}.{hashlib.sha256(' '.join(command).encode()).hexdigest()[:12]}.o"
    depends = target.with_suffix(".d")
    if target.is_file() and depends.is_file() and _fresh(target, depends):
        return target
    print(f"fuzz: compiling {source.name}", file=sys.stderr, flush=True)
    _run([*command, "-MMD", "-MF", depends, "-o", target], f"compiling {source.name}")
    return target


def _fresh(target: Path, depends: Path) -> bool:
    names = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(Path(name).is_file() and Path(name).stat().st_mtime <= made for name in names)


def _run(command: list[str | Path], what: str) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stderr[-4000:], file=sys.stderr)
        raise FuzzError(f"{what} failed (exit {result.returncode})")
