"""How everything is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """folder: for models; gpu_layers: as llama.cpp's -ngl; ik: the Python that has ik_llama_cpp."""

    folder: Path
    rounds: int = 9
    threads: int = 1
    gpu_layers: int = 0
    ik: Path | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """Processor time, which other programs do not disturb, where it is all there is."""
        return time.process_time if self.threads == 1 and not self.gpu_layers else time.perf_counter
