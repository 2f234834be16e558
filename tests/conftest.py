"""Fixtures: where the two libraries are, tiny models, capsules, and a runner per library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

LIBRARIES = {
    "patched": ("KVCAPSULE_TEST_LIB", ROOT / "kvcapsule_gguf" / "lib"),
    "stock": ("KVCAPSULE_TEST_STOCK_LIB", ROOT / "kvcapsule_gguf" / "lib" / "stock"),
}


def library(kind: str) -> Path:
    """The folder of the stock or the patched library; without it the test is skipped, under CI=true it fails."""
    variable, default = LIBRARIES[kind]
    folder = Path(os.environ.get(variable) or default)
    if any(folder.glob("libllama.*")) or any(folder.glob("llama.dll")):
        return folder
    why = f"no {kind} library in {folder}: run scripts/setup, or set {variable}"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(why)
    pytest.skip(why)


def require_server() -> None:
    """Skips the test where llama-server is not built beside the patched library."""
    folder = library("patched")
    if not any((folder / name).is_file() for name in ("llama-server", "bin/llama-server")):
        pytest.skip(f"no llama-server in {folder}: scripts/setup --tools builds it")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user has typed in sessions of their own is left alone."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def llama() -> Iterator[None]:
    """llama_cpp on our libraries, in this process; the environment that names them is put back."""
    from kvcapsule_gguf import native

    saved = dict(os.environ)
    native.load(library("patched"))
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def stock() -> Callable[..., dict[str, Any]]:
    """run(cases) against the stock library."""
    return _runner("stock")


@pytest.fixture(scope="session")
def patched() -> Callable[..., dict[str, Any]]:
    """run(cases) against the patched library."""
    return _runner("patched")


def _runner(kind: str) -> Callable[..., dict[str, Any]]:
    folder = library(kind)

    def run(cases: Iterable[Any], **options: Any) -> dict[str, Any]:
        from llama_runner import run as run_cases

        return run_cases(cases, folder, **options)

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """models(arch="qwen2", head=96, ...) -> path of a tiny GGUF."""
    from tiny_gguf import ModelStore

    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def capsules(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """capsules(model, tiers=(4, 8), ...) -> path of a capsule for that model, lossless by default, see make_capsule.random_capsule."""
    folder = tmp_path_factory.mktemp("capsules")

    def make(model: Path, **options: Any) -> Path:
        from make_capsule import random_capsule

        name = "-".join([model.stem, *(f"{k}={v}" for k, v in sorted(options.items()))]).replace("/", "_").replace(" ", "")
        path = folder / f"{name}.gguf"
        return path if path.exists() else random_capsule(model, path, **options)

    return make
