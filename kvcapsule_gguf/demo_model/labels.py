"""What each patch shows: labels for the auxiliary loss that teaches the eye (and only that)."""

from __future__ import annotations

import numpy as np

from ..scenes import COLOURS, SHAPES, Scene
from ..scenes.drawing import letter_spans, word_font_size
from ..scenes.layout import SIDE

# Number of classes per label; class 0 is "nothing here".
LABELS = {"kind": 1 + len(SHAPES) + 10 + 26, "colour": 1 + len(COLOURS), "letter_index": 5, "row": 4, "column": 4, "centre": 2}


def patch_labels(scene: Scene, size: tuple[int, int] = (SIDE, SIDE), patch: int = 14) -> np.ndarray:
    """int64 [len(LABELS), patches of a picture of width x height]: kind (shape, digit or letter), colour, place of a letter
    in its word, row and column of the cell, and whether the patch is at the centre of an item."""
    width, height = size
    out = np.zeros((len(LABELS), height // patch, width // patch), np.int64)
    zoom = min(size) / SIDE
    x, y = np.meshgrid((np.arange(width // patch) + 0.5) * patch, (np.arange(height // patch) + 0.5) * patch)
    patch = patch / zoom
    for item in scene.items:
        # as seen from the item, in pixels of the layout
        px, py = item.x + (x - item.x * width / SIDE) / zoom, item.y + (y - item.y * height / SIDE) / zoom
        if item.kind == "word":
            tall = word_font_size(item.text, item.radius) * 0.36 + patch * 0.35
            inside = abs(py - item.y) <= tall
            for index, (left, right) in enumerate(letter_spans(item)):
                glyph = inside & (px >= left) & (px < right)
                out[0][glyph] = 1 + len(SHAPES) + 10 + ord(item.text[index]) - 65
                out[2][glyph] = 1 + index
                out[1][glyph] = 1 + list(COLOURS).index(item.colour)
            where = out[2] > 0
            where &= (abs(px - item.x) <= item.radius + patch) & (abs(py - item.y) <= 60)
        else:
            wide = item.radius * (0.75 if item.kind == "digit" else 1.0) + patch * 0.1
            where = (abs(px - item.x) <= wide) & (abs(py - item.y) <= item.radius + patch * 0.1)
            out[0][where] = 1 + (SHAPES.index(item.kind) if item.kind != "digit" else len(SHAPES) + int(item.text))
            out[1][where] = 1 + list(COLOURS).index(item.colour)
        out[3][where] = 1 + item.row
        out[4][where] = 1 + item.column
        out[5][(abs(px - item.x) <= patch) & (abs(py - item.y) <= patch)] = 1
    return out.reshape(len(LABELS), -1)
