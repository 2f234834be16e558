"""A head start for the decoder: words begin near the direction in which the eye already shows what they name."""

from __future__ import annotations

import torch

from ..scenes import COLOURS, SHAPES
from ..scenes.layout import COLUMNS, ROWS
from .labels import LABELS
from .talk import DemoModel
from .tokenizer import SPACE, Tokenizer


@torch.no_grad()
def align_words(model: DemoModel, scale: float = 4.0) -> None:
    """Move embeddings and outputs of colours, shapes, digits, letters and places to the heads' read-out directions."""
    ids = Tokenizer().ids
    rows = dict(zip(LABELS, model.heads.out.weight.split(list(LABELS.values()))))
    letters = [chr(65 + i) for i in range(26)]
    words: dict[str, list[list[str]]] = {
        "kind": [[SPACE + s, f"{SPACE}{s}s"] for s in SHAPES] + [[f"{SPACE}{d}"] for d in range(10)]
        + [[SPACE + c, c] for c in letters],
        "colour": [[SPACE + c] for c in COLOURS],
        "row": [[SPACE + r] for r in ROWS],
        "column": [[SPACE + c] for c in COLUMNS],
    }
    for label, classes in words.items():
        centred = rows[label] - rows[label].mean(0)
        for index, pieces in enumerate(classes):
            direction = centred[index + 1] / centred[index + 1].norm()
            for token in (ids[p] for p in pieces if p in ids):
                model.decoder.embed.weight[token] += scale * direction
                model.decoder.output.weight[token] += 0.15 * scale * direction
