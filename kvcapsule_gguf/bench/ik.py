"""ik_llama.cpp as a rival: a process of its own, since its libraries have the names of llama.cpp's. Its models see text; their sizes are the same."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

from ..chat.args import CACHE_TYPES
from ..chat.stats import BITS
from .geometry import Geometry
from .model import get_model
from .run import Run
from .settings import Setting
from .timing import BenchError

WORKER = Path(__file__).with_name("ik_worker.py")


def text_only(g: Geometry) -> Geometry:
    """The same sizes in an architecture that every fork knows."""
    return replace(g, name=f"{g.name}-text", arch="llama", rope="norm", sections=(0, 0, 0, 0), bias=False, qk_norm=False)


class IkContext:
    """As Context: n tokens in a cache, and the time of a batch behind them. Raises BenchError."""

    def __init__(self, geometry: Geometry, run: Run, setting: Setting, n: int) -> None:
        if run.ik is None:
            raise BenchError(f"{setting.name}: scripts/speed --ik installs ik_llama.cpp, and --ik says where")
        g = text_only(geometry)
        self.n, self.g, self.setting = n, g, setting
        width = g.n_head_kv * g.head
        rows = (int(width * BITS[kind] / 8) for kind in (setting.cache, setting.cache_v))
        wanted = {"model": str(get_model(g, run.folder)), "tokens": n, "type_k": CACHE_TYPES[setting.cache], "type_v": CACHE_TYPES[setting.cache_v], "layers": g.n_layer,
                  "threads": run.threads, **dict(zip(("row_k", "row_v"), rows))}  # fmt: skip
        self.process = subprocess.Popen([str(run.ik), str(WORKER), json.dumps(wanted)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._hear()

    def _hear(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise BenchError(f"{self.setting.name}: the process of ik_llama.cpp ended (status {self.process.wait()})")
        if line.startswith("error: "):
            raise BenchError(f"{self.setting.name}: {line}")
        return line

    def decode(self, n: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return float(self._hear())

    def kv_bytes(self) -> int:
        return int(self.n * self.g.kv_bytes_f16 * (BITS[self.setting.cache] + BITS[self.setting.cache_v]) / 32)

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()
