"""Durations for people, and how long a work still takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def remaining(start: float, done: int, total: int) -> str:
    """Of work that began at `start` (time.monotonic)."""
    return duration((time.monotonic() - start) / max(1, done) * (total - done))


class Progress:
    """A line now and then: what is done, and the time left."""

    def __init__(self, what: str, say: Callable[[str], None], every: float = 20.0) -> None:
        """every: seconds between lines."""
        self.what, self.say, self.every = what, say, every
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int, before: int = 0) -> None:
        """before: of the done ones, those that an interrupted run left."""
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self.say(f"{done} of {total} {self.what}, {remaining(self.start, done - before, total - before)} left")
