"""Attention alone: a model of one layer, with images less without."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median

from .context import Bench, Context
from .geometry import Geometry
from .ik import IkContext
from .run import Run
from .settings import SETTINGS
from .timing import Ratio, in_turns, speedup

DEFAULT = ("f16 FA", "f16 no FA", "q8_0 FA", "q8_0+q4_0 FA", "q4_0 FA", "own f16", "capsule")
STOCK, IK = "fastest of llama.cpp's", "fastest of ik_llama.cpp's"


@dataclass(frozen=True)
class OpRow:
    """One layer, one token: seconds, and how many times faster than each other setting and the fastest stock one."""

    geometry: str
    tokens: int
    setting: str
    seconds: float
    ns_per_token_and_head: float
    kv_bytes: int
    faster_than: dict[str, Ratio]
    fastest_stock: str


def measure_op(geometry: Geometry, tokens: int, names: tuple[str, ...], run: Run) -> list[OpRow]:
    """Raises BenchError."""
    g = geometry.attention_only()
    n = max(1, round(tokens / g.image_tokens))
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(g, run))
        timers, contexts = {}, {}
        for name in names:
            full, empty = (stack.enter_context(closing(_open(bench, g, name, count))) for count in (n, 0))
            contexts[name] = full
            timers[name] = lambda full=full, empty=empty: full.decode(1) - empty.decode(1)
        times = in_turns(timers, run.rounds)
        groups = {STOCK: [name for name in names if SETTINGS[name].stock], IK: [name for name in names if SETTINGS[name].ik]}
        best = {group: min(found, key=lambda name: median(times[name])) for group, found in groups.items() if found}
        rows = []
        for name, found in times.items():
            seconds = median(found)
            faster = {other: speedup(found, x) for other, x in times.items()}
            faster |= {group: faster[first] for group, first in best.items()}
            per_head = 1e9 * seconds / (n * g.image_tokens * g.n_head_kv)
            rows.append(OpRow(geometry.name, n * g.image_tokens, name, seconds, per_head, contexts[name].kv_bytes(), faster, best.get(STOCK, "")))
        return rows


def _open(bench: Bench, g: Geometry, name: str, images: int) -> Context | IkContext:
    setting = SETTINGS[name]
    return IkContext(g, bench.run, setting, images * g.image_tokens) if setting.ik else Context(bench, setting, images)
