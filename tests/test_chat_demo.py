"""The bundled model, its capsule and scripts/demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_chat import Run, chat, environment  # noqa: F401  (chat is a fixture)
from test_native import require_capsules

DEMO = ROOT / "kvcapsule_gguf" / "demo"
TOKENS = 576


@pytest.fixture(scope="session", autouse=True)
def bundled() -> None:
    require_capsules()
    if not list(DEMO.glob("kvdemo-*.gguf")) or not list(DEMO.glob("kvcapsule-kvdemo-*.gguf")):
        pytest.skip("no model or no capsule in kvcapsule_gguf/demo")


def test_a_picture_is_compressed_and_answered(chat: Run) -> None:
    model = next(DEMO.glob("kvdemo-*.gguf"))
    arguments = (model, "--image", DEMO / "scene-1.jpg", "-p", "What is at the top right?", "-n", "16", "--json")
    plain, ours = (json.loads(chat(*arguments, "--capsule", setting).stdout) for setting in ("off", "auto"))
    assert ours["capsule"] and ours["vision_tokens"] == TOKENS
    assert ours["images"][0]["tokens_compressed"] == TOKENS
    assert ours["kv_bytes_f16_equivalent"] == plain["kv_bytes"] > 3 * ours["kv_bytes"]
    assert ours["answer"].strip() == plain["answer"].strip()


def test_a_wide_and_a_tall_picture(chat: Run) -> None:
    """The second model, M-RoPE: each picture is compressed in tiles of its own grid, and the answer stays."""
    model = next((DEMO / "mrope").glob("kvdemo-mrope-*.gguf"))
    pictures = [DEMO / "mrope" / f"scene-{kind}.jpg" for kind in ("wide", "tall")]
    arguments = (model, "--image", pictures[0], "--image", pictures[1], "-p", "Which image has more objects?", "-n", "16", "--json")
    plain, ours = (json.loads(chat(*arguments, "--capsule", setting).stdout) for setting in ("off", "auto"))
    assert ours["capsule"] and ours["vision_tokens"] == plain["vision_tokens"] == sum(image["tokens"] for image in ours["images"])
    assert len(ours["images"]) == 2 and all(image["tokens_compressed"] > image["tokens"] / 2 for image in ours["images"])
    assert plain["kv_bytes"] > 2 * ours["kv_bytes"] and ours["answer"].strip() == plain["answer"].strip()


def test_the_demo() -> None:
    result = subprocess.run([sys.executable, ROOT / "scripts" / "demo", "--no-setup"], env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    answers = re.findall(r"\? +(.*?) +\(drawn: (.*)\)", result.stdout)
    assert len(answers) == 7
    # the model is small and errs; what counts is that it still sees the pictures
    assert sum(answer == drawn for answer, drawn in answers) >= 2, result.stdout
    smaller = [float(x) for x in re.findall(r"([\d.]+)x$", result.stdout, re.MULTILINE)]
    assert len(smaller) == 3 and min(smaller) > 3
