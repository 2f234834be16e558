"""The files of src/capsule and what includes what, as SVG: a row for each layer, the lowest at the bottom, a line for each include."""

from __future__ import annotations

import re
from pathlib import Path

LAYERS = ("api", "graph", "compress", "store", "model", "format", "util", "ggml-capsule")  # from above
WIDTH, ROW, BOX, LEFT = 900, 86, 26, 118
INCLUDE = re.compile(r'^#include "(?:\.\./ggml/src/)?((?:capsule|ggml-capsule)/[^"]+)"', re.MULTILINE)
COLOURS = ("#1f5fbf", "#2a8a57", "#c05a00", "#7a3fa0", "#a0203f", "#50737f", "#777777")


def picture(files: Path) -> str:
    """files: patches/files. A box is a header and its source file; ggml-capsule/ is one box for each file that is included from above."""
    pairs = sorted({(unit(path.relative_to(files / "src").as_posix()), unit(name)) for path in (files / "src" / "capsule").rglob("*.*") for name in INCLUDE.findall(path.read_text(encoding="utf-8"))})
    pairs = [(a, b) for a, b in pairs if a != b and layer(a) in LAYERS and layer(b) in LAYERS]
    rows = {name: sorted({x for pair in pairs for x in pair if layer(x) == name}) for name in LAYERS}
    at = {x: (LEFT + (i + 0.5) * (WIDTH - LEFT - 10) / len(units), 40 + ROW * y) for y, units in enumerate(rows.values()) for i, x in enumerate(units)}
    height = 40 + ROW * (len(LAYERS) - 1) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
    ]
    for a, b in pairs:
        (x0, y0), (x1, y1) = at[a], at[b]
        colour = COLOURS[LAYERS.index(layer(a)) % len(COLOURS)]
        bend = ROW * 0.45 if y0 == y1 else 0  # two of one layer
        out.append(f'<path d="M{x0:.0f} {y0:.0f} Q{(x0 + x1) / 2:.0f} {(y0 + y1) / 2 + bend:.0f} {x1:.0f} {y1:.0f}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>')
    for name, units in rows.items():
        y = at[units[0]][1]
        out.append(f'<text x="10" y="{y + 4:.0f}" font-size="13" font-weight="bold">{name}</text>')
        for x in units:
            label = x.rpartition("/")[2]
            wide = 7 * len(label) + 10
            out.append(f'<rect x="{at[x][0] - wide / 2:.0f}" y="{y - BOX / 2:.0f}" width="{wide}" height="{BOX}" rx="4" fill="#f3f5f8" stroke="#99a"/>')
            out.append(f'<text x="{at[x][0]:.0f}" y="{y + 4:.0f}" text-anchor="middle">{label}</text>')
    return "\n".join([*out, "</svg>", ""])


def unit(path: str) -> str:
    """capsule/store/slots.h -> capsule/store/slots."""
    return path.rpartition(".")[0]


def layer(path: str) -> str:
    """capsule/store/slots -> store."""
    return path.split("/")[1] if path.startswith("capsule/") else path.split("/")[0]
