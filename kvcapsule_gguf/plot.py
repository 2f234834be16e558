"""Small charts as PNG, with Pillow alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f5fbf", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#30b4c5", "#8c564b", "#555555", "#b5179e", "#7a9e00")
WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 36, 44
LEGEND_LINE = 16


@dataclass(frozen=True)
class Series:
    """Points in the order of x; lines connect them if `line`."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_y: bool = False


def png(name: str) -> Path:
    """Of a flag, so that a wrong name is refused before anything is measured."""
    if Path(name).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{name}: pictures are written as .png")
    return Path(name)


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Panels side by side, as PNG. Raises OSError."""
    legend = LEGEND_LINE * max((len(p.series) + 1) // 2 for p in panels)
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT + legend), "white")
    for i, panel in enumerate(panels):
        _Axes(image, i * WIDTH, panel).draw()
    image.save(path)


class _Axes:
    def __init__(self, image: Image.Image, left: int, panel: Panel) -> None:
        self.pen, self.panel = ImageDraw.Draw(image), panel
        self.font = ImageFont.load_default(size=12)
        self.box = (left + LEFT, TOP, left + WIDTH - RIGHT, HEIGHT - BOTTOM)
        points = [(x, y) for s in panel.series for x, y in s.points if not panel.log_y or y > 0]
        xs, ys = ([p[i] for p in points] or [0.0] for i in (0, 1))
        self.x0, self.x1 = _wider(min(xs), max(xs))
        if panel.log_y:
            low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
            self.y0, self.y1 = float(low), float(max(high, low + 1))
        else:
            self.y0, self.y1 = 0.0, max(max(ys) * 1.08, 1e-9)

    def at(self, x: float, y: float) -> tuple[float, float]:
        a, b, c, d = self.box
        y = math.log10(y) if self.panel.log_y else y
        return a + (x - self.x0) / (self.x1 - self.x0) * (c - a), d - (y - self.y0) / (self.y1 - self.y0) * (d - b)

    def draw(self) -> None:
        a, b, c, d = self.box
        self._text(((a + c) / 2, TOP / 2), self.panel.title, "mm")
        self._text(((a + c) / 2, d + 28), self.panel.x, "mm")
        self._text((a - LEFT + 4, b - 20), self.panel.y, "lm")
        for x in _ticks(self.x0, self.x1):
            at = self.at(x, 10**self.y0 if self.panel.log_y else self.y0)[0]
            self.pen.line([at, d, at, d + 4], fill="black")
            self._text((at, d + 14), f"{x:g}", "mm")
        for y in range(int(self.y0), int(self.y1) + 1) if self.panel.log_y else _ticks(self.y0, self.y1):
            at = self.at(self.x0, 10**y if self.panel.log_y else y)[1]
            self.pen.line([a, at, c, at], fill="#dddddd")
            self._text((a - 6, at), f"1e{y:g}" if self.panel.log_y else f"{y:g}", "rm")
        self.pen.rectangle(self.box, outline="black")
        for i, series in enumerate(self.panel.series):
            self._series(series, COLOURS[i % len(COLOURS)], i)

    def _text(self, at: tuple[float, float], words: str, anchor: str) -> None:
        self.pen.text(at, words, anchor=anchor, font=self.font, fill="black")

    def _series(self, series: Series, colour: str, i: int) -> None:
        points = [self.at(x, y) for x, y in series.points if not self.panel.log_y or y > 0]
        if series.line and len(points) > 1:
            self.pen.line(points, fill=colour, width=2)
        for x, y in points:
            self.pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        a, _, c, _ = self.box
        x, y = a + (i % 2) * (c - a) / 2, HEIGHT + 2 + i // 2 * LEGEND_LINE
        self.pen.rectangle([x, y - 5, x + 10, y + 5], fill=colour)
        self._text((x + 16, y), series.name, "lm")


def _wider(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers."""
    raw = (high - low) / 6
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
