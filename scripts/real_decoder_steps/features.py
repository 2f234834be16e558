"""What the trunk says about pictures, kept on disk in chunks, since the trunk never changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from .pictures import Picture, Placed, Sources, make
from .things import Thing
from .trunk import Trunk

CHUNK = 64  # pictures


class Features:
    """Pictures 0, 1, ... of the training set (or the held-out one), as many as there are chunks in the folder."""

    def __init__(self, folder: Path, sources: Sources, onnx_file: Path, held: bool = False, **kind: object) -> None:
        self.folder, self.sources, self.onnx_file, self.held, self.kind = folder, sources, onnx_file, held, kind
        folder.mkdir(parents=True, exist_ok=True)
        self.trunk: Trunk | None = None
        self.tokens: list[np.ndarray] = []
        self.pictures: list[Picture] = []
        while self._load():
            pass

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> torch.Tensor:
        """[256, 384] f32: patch 1 to the last, then the class token."""
        return torch.from_numpy(np.array(self.tokens[i // CHUNK][i % CHUNK])).float()

    def labels(self, i: int) -> np.ndarray:
        """[256]: the number of the thing (or line) that the token shows; -1: none; -2: the class token."""
        return np.append(self.pictures[i].labels.reshape(-1)[1:], -2)

    def add_chunk(self) -> None:
        """Makes the next CHUNK pictures: about 8 seconds of one core."""
        n = len(self.tokens)
        pictures = [make(i, self.sources, self.held, **self.kind) for i in range(n * CHUNK, (n + 1) * CHUNK)]
        self.trunk = self.trunk or Trunk(self.onnx_file, dtype=torch.bfloat16)
        tokens = torch.cat([self.trunk.tokens([p.image for p in pictures[i:i + 16]]) for i in range(0, CHUNK, 16)])
        about = [{
            "kind": p.kind, "lines": p.lines, "labels": p.labels.reshape(-1).tolist(),
            "placed": [[q.thing.name, q.thing.noun, q.thing.colour, q.x, q.y] for q in p.placed],
        } for p in pictures]
        self._file(n, "json").write_text(json.dumps(about))
        new = self._file(n, "new")
        with new.open("wb") as f:
            np.save(f, tokens.half().numpy())
        os.replace(new, self._file(n, "npy"))
        self._load()

    def _file(self, n: int, suffix: str) -> Path:
        return self.folder / f"{n:04d}.{suffix}"

    def _load(self) -> bool:
        n = len(self.tokens)
        if not self._file(n, "npy").exists():
            return False
        for p in json.loads(self._file(n, "json").read_text()):
            placed = [Placed(Thing(name, noun, colour), x, y) for name, noun, colour, x, y in p["placed"]]
            self.pictures.append(Picture(p["kind"], None, placed, p["lines"], np.array(p["labels"])))
        self.tokens.append(np.load(self._file(n, "npy"), mmap_mode="r"))
        return True
