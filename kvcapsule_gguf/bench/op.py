"""Attention alone: a model of one layer, with images less without."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..codec.cut import BlockShape
from .context import Bench, Context
from .geometry import Geometry
from .model import get_model
from .settings import SETTINGS
from .timing import in_turns, speedup

DEFAULT = ("f16 FA", "f16 no FA", "q8_0 FA", "q4_0 FA", "own f16", "own q8_0", "pca", "retain")
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


def measure_op(geometry: Geometry, folder: Path, tokens: int, names: tuple[str, ...], rounds: int, threads: int, shape: BlockShape) -> list[OpRow]:
    """Raises BenchError."""
    g = geometry.attention_only()
    n = max(1, round(tokens / g.image_tokens))
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(g, get_model(g, folder), shape))
        timers, contexts = {}, {}
        for name in names:
            full, empty = (stack.enter_context(closing(Context(bench, SETTINGS[name], count, threads))) for count in (n, 0))
            contexts[name] = full
            timers[name] = lambda full=full, empty=empty: full.decode(1) - empty.decode(1)
        times = in_turns(timers, rounds)
        rows = []
        for name, found in times.items():
            seconds = median(found)
            faster = {other: speedup(found, times[other]) for other in REFERENCES if other in times}
            per_head = 1e9 * seconds / (n * g.image_tokens * g.n_head_kv)
            rows.append(OpRow(geometry.name, n * g.image_tokens, name, seconds, per_head, contexts[name].kv_bytes(), faster))
        return rows
