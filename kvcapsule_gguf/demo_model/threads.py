"""How many threads to train with on a machine that others use too."""

from __future__ import annotations

import os
import time
from pathlib import Path

_last: tuple[float, float, float] | None = None


def spare_threads() -> int:
    """All cores minus those that other processes were busy on since the last call (at least 1)."""
    global _last
    ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    now = (time.time(), busy, own.user + own.system)
    before, _last = _last, now
    if before is None or now[0] - before[0] < 1:
        return 1
    others = ((now[1] - before[1]) - (now[2] - before[2])) / (now[0] - before[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(cores + 0.2 - others))
