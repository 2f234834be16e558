"""The demo model answers the same questions with the capsule off and on, all layers on the device, then half of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend_cases import Device
from setup_steps.common import ROOT

DEMO = ROOT / "kvcapsule_gguf" / "demo"
QUESTIONS = ("What is at the top right?", "Where is the circle?", "What does the word say?")
RUNS = (("off", 99), ("auto", 99), ("auto", 4))  # --capsule, -ngl


@dataclass(frozen=True)
class Answers:
    capsule: str
    ngl: int
    texts: tuple[str, ...] = ()
    kv_bytes_f16: int = 0
    kv_bytes: int = 0
    error: str = ""


def ask(lib: Path, device: Device, timeout: float) -> Iterator[Answers]:
    """One Answers for each of RUNS. timeout: seconds for each of them."""
    for capsule, ngl in RUNS:
        try:
            yield _ask(lib, device, capsule, ngl, timeout)
        except subprocess.TimeoutExpired:
            yield Answers(capsule, ngl, error=f"no answer in {timeout:.0f} s")


def _ask(lib: Path, device: Device, capsule: str, ngl: int, timeout: float) -> Answers:
    model = next(p for p in sorted(DEMO.glob("kvdemo-*.gguf")))
    where = [*(["--device", device.name] if device.name else []), *(["--rpc", device.rpc] if device.rpc else [])]
    command = [sys.executable, "-m", "kvcapsule_gguf.chat.cli", str(model), "--capsule", capsule, "-ngl", str(ngl), *where]
    command += ["--temp", "0", "-n", "16", "-c", "2048", "--json"]
    lines = "".join(f"{line}\n" for line in (f"/image {DEMO / 'scene-1.jpg'}", *QUESTIONS))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "LLAMA_KVCAPSULE"))} | {"KVCAPSULE_LIB": str(lib)}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=lines, capture_output=True, text=True, timeout=timeout)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(reports) != len(QUESTIONS):
        return Answers(capsule, ngl, error=f"ended with status {done.returncode}: {done.stderr[-300:]}")
    texts = tuple(r["answer"].strip() for r in reports)
    return Answers(capsule, ngl, texts, reports[-1]["kv_bytes_f16_equivalent"], reports[-1]["kv_bytes"])
