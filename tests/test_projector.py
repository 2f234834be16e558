"""A projector of another family: llama.cpp takes it where the sizes fit, and the answers are nonsense. Every program refuses it with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import TOKENS, write_folder
from conftest import ROOT, library, require_server
from test_native import require_capsules

from kvcapsule_gguf.format.projector import fixed_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    return write_folder(tmp_path_factory.mktemp("projector"), ("llama", "qwen2vl"))


def test_the_size_of_a_picture_is_known_where_all_have_one(folder: Path, tmp_path: Path) -> None:
    demo = ROOT / "kvcapsule_gguf" / "demo"
    assert fixed_tokens(folder / "llama" / "mmproj-tiny.gguf") == TOKENS and fixed_tokens(demo / "mmproj-kvdemo-8M-v1-F16.gguf") == 24 * 24
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for path in (folder / "qwen2vl" / "mmproj-tiny.gguf", folder / "llama" / "tiny.gguf", tmp_path / "broken.gguf", tmp_path / "none.gguf"):
        assert fixed_tokens(path) == 0


@pytest.mark.parametrize("program", ["chat", "train", "eval", "server"])
@pytest.mark.parametrize(("model", "other"), [("llama", "qwen2vl"), ("qwen2vl", "llama")])
def test_it_is_refused(folder: Path, program: str, model: str, other: str) -> None:
    file, mmproj, capsule = folder / model / "tiny.gguf", folder / other / "mmproj-tiny.gguf", folder / model / "kvcapsule-tiny.gguf"
    arguments = {
        "chat": ["-p", "hi"],
        "train": ["--images", str(folder), "-o", str(folder / "out.gguf")],
        "eval": ["--capsule", str(capsule), "--images", str(folder)],
        "server": ["--port", "0"],
    }[program]
    if program == "server":
        require_server()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched"))}
    command = [sys.executable, "-c", f"from kvcapsule_gguf.{program}.cli import main; raise SystemExit(main())", str(file), "--mmproj", str(mmproj), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    kind = {"llama": "mlp", "qwen2vl": "qwen2vl_merger"}[other]
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].endswith(f"mmproj-tiny.gguf is the projector of another kind of model ({kind}): give the one that was made with this model")
    assert "Traceback" not in result.stderr
