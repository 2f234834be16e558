"""Durations for people."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def remaining(start: float, done: int, total: int) -> str:
    """Of work that began at `start` (time.monotonic)."""
    return duration((time.monotonic() - start) / max(1, done) * (total - done))
