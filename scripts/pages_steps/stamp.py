"""What every page of measurements says: on which machine, of which commit, when."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine())
    width = " with AVX-512" if "avx512_vnni" in text else " with AVX2" if "avx2" in text else ""
    return f"{name}{width}, {os.cpu_count()} CPUs"


def stamp() -> str:
    """ "AMD EPYC with AVX-512, 2 CPUs, commit 1234567, 2026-12-01"; a + behind the commit says that files were changed."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "patches", "kvcapsule_gguf"], capture_output=True, check=False).returncode == 1
    return f"{cpu()}, commit {commit}{'+' if changed else ''}, {datetime.date.today()}"
