"""Attention alone: a model of one layer, with images less without."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median

from .context import Bench, Context
from .geometry import Geometry
from .run import Run
from .settings import SETTINGS
from .timing import in_turns, speedup

DEFAULT = ("f16 FA", "f16 no FA", "q8_0 FA", "q8_0+q4_0 FA", "q4_0 FA", "own f16", "capsule")
REFERENCES = ("f16 FA", "f16 no FA", "own f16")


@dataclass(frozen=True)
class OpRow:
    """One layer, one token: seconds, and how many times faster than each of REFERENCES that was measured."""

    geometry: str
    tokens: int
    setting: str
    seconds: float
    ns_per_token_and_head: float
    kv_bytes: int
    faster_than: dict[str, float]


def measure_op(geometry: Geometry, tokens: int, names: tuple[str, ...], run: Run) -> list[OpRow]:
    """Raises BenchError."""
    g = geometry.attention_only()
    n = max(1, round(tokens / g.image_tokens))
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(g, run))
        timers, contexts = {}, {}
        for name in names:
            full, empty = (stack.enter_context(closing(Context(bench, SETTINGS[name], count))) for count in (n, 0))
            contexts[name] = full
            timers[name] = lambda full=full, empty=empty: full.decode(1) - empty.decode(1)
        times = in_turns(timers, run.rounds)
        rows = []
        for name, found in times.items():
            seconds = median(found)
            faster = {other: speedup(found, times[other]) for other in REFERENCES if other in times}
            per_head = 1e9 * seconds / (n * g.image_tokens * g.n_head_kv)
            rows.append(OpRow(geometry.name, n * g.image_tokens, name, seconds, per_head, contexts[name].kv_bytes(), faster))
        return rows
