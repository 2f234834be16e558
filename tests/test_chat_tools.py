"""llama-mtmd-cli knows nothing of capsules: with LLAMA_KVCAPSULE it answers as kvcapsule-chat does (scripts/setup --tools builds it)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import library
from make_capsule import random_capsule
from test_chat import Run, chat, environment  # noqa: F401  (chat is a fixture)
from test_chat_capsule import folder  # noqa: F401  (a fixture)
from test_native import require_capsules


@pytest.fixture
def mtmd_cli() -> Path:
    require_capsules()
    path = library("patched") / "bin" / "llama-mtmd-cli"
    if not path.is_file():
        pytest.skip("llama-mtmd-cli is not built: scripts/setup --tools")
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_the_capsule_of_the_environment(mtmd_cli: Path, chat: Run, folder: Path, tmp_path: Path, arch: str) -> None:
    lossy = random_capsule(folder / arch / "tiny.gguf", tmp_path / "lossy.gguf", tiers=((0, 1), 3))  # lossy enough to change the answer
    common = ["-m", folder / arch / "tiny.gguf", "--mmproj", folder / arch / "mmproj-tiny.gguf", "--image", folder / "a.png", "-p", "hello", "-n", "8", "-c", "1024"]
    answers = []
    for capsule in (None, lossy):
        env = environment(**({"LLAMA_KVCAPSULE": str(capsule), "LLAMA_KVCAPSULE_HOT": "256", "LLAMA_KVCAPSULE_RATIO": "0.9"} if capsule else {}))
        answers.append(chat(*common, "--hot", "256", *(("--capsule", capsule, "--ratio", "0.9") if capsule else ("--capsule", "off"))).stdout.strip())
        # its log is written by a thread, which at the end may not have written all: never something else, but now and then too little
        for _ in range(20):
            result = subprocess.run([mtmd_cli, *map(str, common), "--temp", "0", "-t", "1"], env=env, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr
            said = "".join(result.stdout.strip().splitlines()[-1:])
            assert answers[-1].startswith(said)
            if said == answers[-1]:
                break
        else:
            pytest.fail(f"{answers[-1]!r} is never there")
    assert answers[0] != answers[1]
