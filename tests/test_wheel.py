"""The wheel around the libraries of this build, installed without a network or a compiler; and where ggml looks for its backends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, library

OUTSIDE = ("kvcapsule_gguf/demo/mrope/", "kvcapsule_gguf/demo_model/", "kvcapsule_gguf/study/", "kvcapsule_gguf/lib/stock/", "tests/", "patches/", "scripts/")
BARE = {"PATH": "/nowhere", "HOME": "/nowhere"}  # no compiler, no settings


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env={"LANG": "C.UTF-8", **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "lib").mkdir()
    for path in library("patched").iterdir():
        # without their version links: a wheel holds no links, and the build for a wheel has none
        if path.is_file() and (path.name == "build.json" or path.suffix in (".so", ".dylib") or path.name.partition(".so.")[2].isdigit()):
            shutil.copy2(path, folder / "lib")
    env = {"KVCAPSULE_WHEEL_LIB": str(folder / "lib"), "PATH": os.environ["PATH"]}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, ROOT, cwd=folder, **env)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path) -> Path:
    """An environment with the wheel; what it depends on is that of this Python, in which the wheel itself is not."""
    venv = wheel.parent / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=wheel.parent)
    run(sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent, PATH=os.environ["PATH"])
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return venv / "bin"


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(OUTSIDE)]
    for wanted in ("kvcapsule_gguf/py.typed", "kvcapsule_gguf/lib/build.json", "kvcapsule_gguf/demo/scene-1.jpg", "kvcapsule_gguf/chat/cli.py"):
        assert wanted in names
    text = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:")]
    assert required and not [line for line in required if "llama-cpp-python" in line and "extra ==" not in line], "llama-cpp-python would be compiled"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="paths of Linux")
def test_the_installed_programs(programs: Path) -> None:
    package = next(programs.parent.glob("lib/python*/site-packages/kvcapsule_gguf"))
    said = run(programs / "kvcapsule-inspect", "--version", cwd=programs, **BARE)
    assert f"libraries: {package / 'lib'}" in said and "llama.cpp 0c1e57098" in said and "0001-" in said
    model = next((package / "demo").glob("kvdemo-*.gguf"))
    picture = package / "demo" / "scene-1.jpg"
    chat = [programs / "kvcapsule-chat", model, "--image", picture, "-p", "What is at the top right?"]
    assert run(*chat, cwd=programs, **BARE).strip() == "yellow star"


# --- backends --------------------------------------------------------------------------------------------------------------------------------

BACKEND = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void ran(void) { FILE * f = fopen(getenv("MARK"), "a"); if (f) { fputs("ran\\n", f); fclose(f); } }
int ggml_backend_score(void) { return 0; }
"""
LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).ggml_backend_load_all()"


def loads(tmp_path: Path, lib: Path, place: Path, *command: str | Path) -> bool:
    """Whether a backend in the folder `place` is run by a program whose current folder that is."""
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    (tmp_path / "x.c").write_text(BACKEND)
    place.mkdir(exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", place / "libggml-cpu-x.so", tmp_path / "x.c"], check=True)
    (tmp_path / "mark").unlink(missing_ok=True)
    env = {**os.environ, "MARK": str(tmp_path / "mark")}
    subprocess.run(command or [sys.executable, "-c", LOAD, lib / "libggml.so"], cwd=place, env=env, capture_output=True, timeout=120)
    return (tmp_path / "mark").exists()


def test_backends_of_the_current_folder_are_not_loaded(tmp_path: Path) -> None:
    assert not loads(tmp_path, library("patched"), tmp_path / "here")
    assert loads(tmp_path, library("stock"), tmp_path / "here"), "llama.cpp does it: this test can fail"


def test_a_relative_path_to_the_library_is_no_way_to_the_current_folder(tmp_path: Path) -> None:
    """The folder is found when ggml is loaded, and the program may go somewhere else afterwards."""
    sub, away = tmp_path / "sub", tmp_path / "away"
    sub.mkdir()
    away.mkdir()
    (sub / "lib").symlink_to(library("patched"))
    code = f"import ctypes, os; os.chdir({str(sub)!r}); ggml = ctypes.CDLL('lib/libggml.so'); os.chdir({str(away)!r}); ggml.ggml_backend_load_all()"
    assert not loads(tmp_path, library("patched"), away / "lib", sys.executable, "-c", code)


def test_backends_beside_ggml_are_loaded(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    for path in library("patched").glob("libggml*.so*"):
        shutil.copy2(path, lib / path.name)
    assert loads(tmp_path, lib, lib, sys.executable, "-c", f"import os; os.chdir('/'); import ctypes; ctypes.CDLL({str(lib / 'libggml.so')!r}).ggml_backend_load_all()")


@pytest.mark.parametrize("tool", [["llama-mtmd-cli", "--list-devices"], ["llama-server", "--list-devices"]], ids=lambda tool: tool[0])
def test_tools_in_a_hostile_folder(tmp_path: Path, tool: list[str]) -> None:
    program = library("patched") / "bin" / tool[0]
    if not program.is_file():
        pytest.skip("scripts/setup --tools builds it")
    assert not loads(tmp_path, library("patched"), tmp_path / "here", program, *tool[1:])
