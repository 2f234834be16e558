"""Cached ViT features of scenes, in shards, so that the decoder can be trained without running the ViT again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..scenes import draw_scene, make_scene
from .config import VisionConfig
from .train_eye import EyeTrainer, to_input
from .vision import Vision

SHARD = 128  # scenes per file
RANDOM_WORDS = 0.15  # share of words made of random letters, in training pictures


def training_scene(seed: int):
    """Scene of a training seed, as drawn and as asked about."""
    return make_scene(seed, random_words=RANDOM_WORDS)


def load_eye(path: Path) -> EyeTrainer:
    """Vision tower and heads of a checkpoint of phase 1."""
    model = EyeTrainer()
    tensors = load_file(path)
    tensors.pop("samples", None)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def write_shard(vision: Vision, folder: Path, start: int, random_words: float = RANDOM_WORDS, count: int = SHARD) -> Path:
    """Features of the scenes start .. start + count as float16 [count, 576, width]."""
    path = folder / f"{start:08d}.npy"
    if path.exists():
        return path
    device = next(vision.parameters()).device
    out = np.empty((count, VisionConfig.image**2 // VisionConfig.patch**2, vision.cfg.width), np.float16)
    for at in range(0, count, 8):
        seeds = range(start + at, start + min(at + 8, count))
        images = np.stack([np.asarray(draw_scene(make_scene(s, random_words=random_words))) for s in seeds])
        out[at : at + 8] = vision.features(to_input(torch.from_numpy(images).to(device))).cpu().numpy()
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.save(file, out)
    path.with_suffix(".tmp").rename(path)
    return path


class FeatureStore:
    """All shards in a folder (more may appear while training), opened as memory maps."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: dict[int, np.ndarray] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find new shards."""
        for path in sorted(self.folder.glob("*.npy")):
            if int(path.stem) not in self.shards:
                self.shards[int(path.stem)] = np.load(path, mmap_mode="r")

    def seeds(self) -> np.ndarray:
        """Seeds of all scenes held."""
        return np.concatenate([np.arange(s, s + len(a)) for s, a in self.shards.items()])

    def __getitem__(self, seed: int) -> np.ndarray:
        """float16 [576, width]."""
        start = max(s for s in self.shards if s <= seed)
        return self.shards[start][seed - start]
