"""Whole models: decoding, the first token of a question, and memory against the number of images."""

from __future__ import annotations

import gc
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..chat.stats import BITS
from .context import Bench, Context
from .geometry import Geometry
from .ik import IkContext
from .run import Run
from .settings import SETTINGS
from .timing import Ratio, in_turns, speedup

DEFAULT = ("f16 FA", "f16 no FA", "q8_0 FA", "q8_0+q4_0 FA", "q4_0 FA")
MIB = 1 << 20
TEXT_SHARES = (0.1, 0.5)


@dataclass(frozen=True)
class WholeRow:
    """A cache with images: decoding, the first token of a question (0: none was asked), and how many times faster each is with the capsule."""

    geometry: str
    images: int
    setting: str
    tokens_per_s: float
    first_token_s: float
    token_ratio: Ratio
    first_token_ratio: Ratio
    kv_bytes: int
    memory_bytes: int
    text_kv_bytes: tuple[int, ...]  # kv_bytes and text besides: TEXT_SHARES of all tokens


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def measure_whole(geometry: Geometry, images: int, capsule: str, rivals: tuple[str, ...], run: Run, question: int = 64) -> list[WholeRow]:
    """question: its tokens, 0 = none. The capsule's row first; each rival is open at the same time as the capsule, one after the other. Raises BenchError."""
    rows: list[WholeRow] = []
    with Bench(geometry, run) as bench:
        ours, memory = _open(bench, capsule, images)
        with closing(ours):
            for name in rivals:
                other, other_memory = _open(bench, name, images)
                with closing(other):
                    timers = {}
                    for who, context in (("ours", ours), ("other", other)):
                        timers[who] = lambda c=context: c.decode(1)
                        timers[who + " first"] = lambda c=context: c.decode(question) if question else 0.0
                    t = in_turns(timers, run.rounds)
                    if not rows:
                        rows.append(_row(geometry, images, capsule, ours, memory, t["ours"], t["ours first"], *(speedup([1.0], [1.0]) for _ in range(2))))
                    ratios = speedup(t["ours"], t["other"]), speedup(t["ours first"], t["other first"])
                    rows.append(_row(geometry, images, name, other, other_memory, t["other"], t["other first"], *ratios))
    return rows


def _open(bench: Bench, name: str, images: int) -> tuple[Context | IkContext, int]:
    """And the memory of this process that it takes; that of ik_llama.cpp is another one."""
    gc.collect()
    before, g, setting = anonymous_bytes(), bench.geometry, SETTINGS[name]
    context = IkContext(g, bench.run, setting, images * g.image_tokens) if setting.ik else Context(bench, setting, images)
    context.decode(1)
    gc.collect()
    return context, anonymous_bytes() - before


def _row(g: Geometry, images: int, name: str, context: Context | IkContext, memory: int, token: list[float], first: list[float], token_ratio: Ratio, first_ratio: Ratio) -> WholeRow:
    kv = context.kv_bytes()
    text = images * g.image_tokens * g.kv_bytes_f16 * (BITS[SETTINGS[name].cache] + BITS[SETTINGS[name].cache_v]) / 32  # as many tokens of text as of images
    totals = tuple(int(kv + text * share / (1 - share)) for share in TEXT_SHARES)
    return WholeRow(g.name, images, name, 1 / median(token), median(first), token_ratio, first_ratio, kv, memory, totals)
