"""Tables for the terminal (markdown) and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import plot
from .compress import CompressRow
from .demo import DemoRow
from .op import IK, STOCK, OpRow
from .whole import MIB, TEXT_SHARES, WholeRow

OTHERS = (STOCK, "own f16", IK)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def op_table(rows: Sequence[OpRow]) -> str:
    head = ["heads of", "tokens", "cache", "ms a layer", "ns a token and KV head", *(f"times {name}" for name in OTHERS)]
    body = []
    for r in rows:
        faster = [str(r.faster_than.get(name, "")) for name in OTHERS]
        faster[0] += " (fastest)" if r.setting == r.fastest_stock else ""
        body.append([r.geometry, str(r.tokens), r.setting, f"{1e3 * r.seconds:.2f}", f"{r.ns_per_token_and_head:.1f}", *faster])
    return table(head, body)


def whole_table(rows: Sequence[WholeRow]) -> str:
    head = ["model", "images", "cache", "tokens/s", "the capsule is x faster", "first token, s", "the capsule is x faster", "KV of the images, MiB",
            *(f"with {share:.0%} text" for share in TEXT_SHARES), "memory, MiB"]
    body = []
    for r in rows:
        first = "" if r.setting == rows[0].setting else str(r.token_ratio)
        second = "" if r.setting == rows[0].setting or not r.first_token_s else str(r.first_token_ratio)
        body.append([r.geometry, str(r.images), r.setting, f"{r.tokens_per_s:.2f}", first, f"{r.first_token_s:.2f}" if r.first_token_s else "", second,
                     f"{r.kv_bytes / MIB:.0f}", *(f"{n / MIB:.0f}" for n in r.text_kv_bytes), f"{r.memory_bytes / MIB:.0f}"])
    return table(head, body)


def compress_table(rows: Sequence[CompressRow]) -> str:
    head = ["model", "tokens", "cache", "threads", "ms a layer", "prefill, ms a layer", "share", "an image, s"]
    body = [[r.geometry, str(r.tokens), r.setting, str(r.threads), f"{1e3 * r.seconds:.1f}", f"{1e3 * r.prefill_seconds:.1f}", f"{r.share:.1%}", f"{r.layers * r.seconds:.2f}"]
            for r in rows]  # fmt: skip
    return table(head, body)


def demo_table(rows: Sequence[DemoRow]) -> str:
    head = ["pictures", "cache", "ms a token", "times the fastest of llama.cpp's", "ms for 64 tokens", "times the fastest of llama.cpp's"]
    return table(head, [[str(r.pictures), r.setting, f"{r.token_ms:.2f}", str(r.token_speedup), f"{r.question_ms:.1f}", str(r.question_speedup)]
                        for r in rows])


def op_plot(rows: Sequence[OpRow], path: Path) -> None:
    """Milliseconds against tokens, a panel for each geometry."""
    panels = []
    for geometry in dict.fromkeys(r.geometry for r in rows):
        mine = [r for r in rows if r.geometry == geometry]
        series = [plot.Series(name, [(r.tokens / 1024, 1e3 * r.seconds) for r in mine if r.setting == name]) for name in dict.fromkeys(r.setting for r in mine)]
        panels.append(plot.Panel(geometry, "vision tokens, thousands", "ms of attention a token and layer", series, log_y=True))
    plot.draw(path, panels)


def whole_plot(rows: Sequence[WholeRow], path: Path) -> None:
    """Tokens a second against images, a panel for each geometry."""
    panels = []
    for geometry in dict.fromkeys(r.geometry for r in rows):
        mine = [r for r in rows if r.geometry == geometry]
        series = [plot.Series(name, [(r.images, r.tokens_per_s) for r in mine if r.setting == name]) for name in dict.fromkeys(r.setting for r in mine)]
        panels.append(plot.Panel(geometry, "images", "tokens/s", series))
    plot.draw(path, panels)
