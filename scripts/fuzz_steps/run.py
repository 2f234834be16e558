"""Runs a harness: libFuzzer where there is clang, else the standalone driver, which understands the same flags."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setup_steps.common import VENV

from .build import HARNESSES, OUT, Compiler, FuzzError
from .corpus import folders

MAX_LEN = {"capsule": 8192, "state": 4096, "context": 1024}


@dataclass(frozen=True)
class Outcome:
    target: str
    engine: str
    runs: int
    seconds: int
    seed: int
    edges: int | None  # covered, of libFuzzer only

    def line(self) -> str:
        edges = f", {self.edges} edges covered" if self.edges else ""
        return f"{self.target}: {self.runs} runs in {self.seconds} s without a finding ({self.engine}, ASan + UBSan, seed {self.seed}{edges})"


def run(target: str, program: Path, compiler: Compiler, *, runs: int, seconds: int, seed: int, quiet: bool = False) -> Outcome:
    """seconds 0: no limit. Raises FuzzError with the path of the input that broke it."""
    broken = OUT / "crashes" / target
    broken.mkdir(parents=True, exist_ok=True)
    command = [program, f"-runs={runs}", f"-seed={seed}", f"-artifact_prefix={broken}/"]
    if seconds:
        command.append(f"-max_total_time={seconds}")
    if compiler.libfuzzer:
        command += [f"-max_len={MAX_LEN[target]}", "-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=256", "-print_final_stats=1"]
    command += folders(target)
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=0:detect_leaks=1:max_allocation_size_mb=256"}
    if target == "context":
        environment |= _context()
    process = subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace", env=environment)
    assert process.stderr is not None
    log: list[str] = []
    try:
        for line in process.stderr:
            log = [*log[-400:], line]
            if "pulse" in line and not quiet:
                print(f"fuzz: {target}: {line.strip()}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        process.terminate()
        raise
    text = "".join(log)
    if process.wait() != 0:
        print(text[-6000:], file=sys.stderr)
        found = re.search(r"Test unit written to (\S+)", text)
        raise FuzzError(f"{target}: the harness ended with exit {process.returncode}, input: {found.group(1) if found else 'not saved'}")
    done = re.search(r"Done (\d+) runs in (\d+) second", text)
    if not done:
        raise FuzzError(f"{target}: the harness did not say how many runs it did")
    edges = re.findall(r"cov: (\d+)", text)
    return Outcome(target, compiler.name, int(done.group(1)), int(done.group(2)), seed, int(edges[-1]) if edges else None)


def _context() -> dict[str, str]:
    """The variables that context.cpp reads; makes the files that they name."""
    folder = OUT / "context"
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = subprocess.run([python if python.is_file() else sys.executable, HARNESSES / "make_context.py", folder], capture_output=True, text=True)
    if made.returncode != 0:
        raise FuzzError(f"the model for the target could not be made: {made.stderr.strip().splitlines()[-1]}")
    return {"FUZZ_MODEL": str(folder / "model.gguf"), "FUZZ_CAPSULE": str(folder / "capsule.gguf"), "FUZZ_SEEDS": str(folders("context")[0])}
