"""The chart of the README as SVG: how far answers move against how much smaller the cache of a picture is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 700, 54, 326
TIMES = (1, 8)  # of the x axis
KLD = (-6, 0)  # powers of ten of the y axis
CAPSULE, BUILT_IN, TYPES, DROP = "#1f5fbf", "#2a8a57", "#555555", "#c05a00"
QUALITIES = ("0.5", "0.75", "1", "1.5")
# of each setting: colour, what it is called, where its name stands
NAMES = {
    "q8_0": (TYPES, "q8_0", "right"),
    "q4_0": (TYPES, "q4_0", "left, up"),
    "q4_0-vision": (TYPES, "q4_0, picture only", "left, down"),
    "drop0.6": (DROP, "60 % of the tokens left out", "right"),
    "drop0.8": (DROP, "80 % left out", "right"),
    **{f"built-in, quality {q}": (BUILT_IN, "built-in capsule" if q == "0.5" else "", "left, down") for q in QUALITIES},
    **{f"capsule, quality {q}": (CAPSULE, "fitted capsule" if q == "1" else "", "below") for q in QUALITIES},
}


def quality(results: Path) -> str:
    """results: eval.json of kvcapsule-eval."""
    data = json.loads(results.read_text(encoding="utf-8"))
    settings = {s["setting"]: s for s in data["settings"]}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>',
        text(LEFT, 24, "How far answers move from those with an f16 cache (KL divergence; lower is better)", weight="bold"),
        text(LEFT, 42, f"demo model, {data['questions']:,} questions, {data['pictures']} held-out scenes; bars: 95 % intervals; capsules at qualities 0.5 to 1.5", fill="#555"),
        *axes(),
    ]
    for line_colour in (BUILT_IN, CAPSULE):
        line = [at(settings[name]) for name, (colour, _, _) in NAMES.items() if colour == line_colour]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}" fill="none" stroke="{line_colour}" stroke-width="2"/>')
    for name, (colour, label, side) in NAMES.items():
        parts += point(settings[name], colour, label, side)
    return "\n".join([*parts, "</svg>", ""])


def x_of(times: float) -> float:
    return LEFT + (times - TIMES[0]) / (TIMES[1] - TIMES[0]) * (RIGHT - LEFT)


def y_of(kld: float) -> float:
    return BOTTOM - (math.log10(max(kld, 10.0 ** KLD[0])) - KLD[0]) / (KLD[1] - KLD[0]) * (BOTTOM - TOP)


def at(setting: dict[str, Any]) -> tuple[float, float]:
    return x_of(setting["times_smaller"]), y_of(setting["kld"])


def axes() -> list[str]:
    out = []
    for power in range(KLD[0], KLD[1] + 1):
        y = y_of(10.0**power)
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(text(LEFT - 8, y + 4, f"{10.0**power:.{max(-power, 0)}f}", anchor="end"))
    for times in range(TIMES[0], TIMES[1]):
        out.append(text(x_of(times), BOTTOM + 20, f"{times}x", anchor="middle"))
    out.append(text((LEFT + RIGHT) / 2, BOTTOM + 42, "how much smaller the cache of a picture is than in f16", anchor="middle"))
    return out


def point(setting: dict[str, Any], colour: str, label: str, side: str) -> list[str]:
    x, y = at(setting)
    low, high = (y_of(bound) for bound in setting["kld_95"])
    tx, ty, anchor = {
        "right": (x + 10, y + 4, "start"),
        "below": (x + 10, y + 18, "start"),
        "under": (x, y + 20, "middle"),
        "left, up": (x - 10, y, "end"),
        "left, down": (x - 8, y + 16, "end"),
    }[side]
    return [
        f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="1.5"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>',
        *([text(tx, ty, label, anchor=anchor, fill=colour)] if label else []),
    ]


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal", fill: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{words}</text>'
