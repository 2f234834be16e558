"""Phase 1: the eye alone (ViT and projector), taught by what each patch shows."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..scenes import TRAIN, draw_scene, make_scene
from .config import VisionConfig
from .labels import patch_labels
from .optim import Optimisers, schedule
from .threads import spare_threads
from .vision import PatchHeads, Vision


class DrawnPatches(torch.utils.data.IterableDataset):
    """Endless pictures uint8 [336, 336, 3] with patch labels, from seeds counted up."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        step, offset = (info.num_workers, info.id) if info else (1, 0)
        for seed in range(self.start + offset, TRAIN.stop, step):
            scene = make_scene(seed, dense=seed % 4 != 0, random_words=0.7)
            yield np.array(draw_scene(scene)), patch_labels(scene)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], as llama.cpp does with mean = std = 0.5."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class EyeTrainer(torch.nn.Module):
    """Vision and its training heads."""

    def __init__(self, width: int = 256, cfg: VisionConfig = VisionConfig()):
        super().__init__()
        self.vision = Vision(cfg, width)
        self.heads = PatchHeads(width)

    def forward(self, images, labels):
        return self.heads.loss(self.vision(images), labels)


def train_eye(state: Path, minutes: float, batch: int = 8, lr: float = 2e-3, workers: int = 1, compile: bool = True,
              device: str = "cpu", seed: int = 0) -> None:
    """Train for so many minutes from the checkpoint in `state`, if any; writes state/eye.safetensors."""
    torch.manual_seed(seed)
    model = EyeTrainer().to(device)
    path, start = state / "eye.safetensors", 0
    if path.exists():
        tensors = load_file(path)
        start = int(tensors.pop("samples"))
        model.load_state_dict(tensors)
    data = iter(torch.utils.data.DataLoader(DrawnPatches(start), batch, num_workers=workers, prefetch_factor=8))
    optimiser = Optimisers(model.named_parameters(), lr, matrix_lr=1.5 * lr)
    run = torch.compile(model) if compile else model
    began, step, seen = time.time(), 0, start
    while (progress := (time.time() - began) / (minutes * 60)) < 1:
        if step % 20 == 0 and device == "cpu":
            torch.set_num_threads(spare_threads())
        images, labels = (t.to(device) for t in next(data))
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss, accuracy = run(to_input(images), labels)
        loss.backward()
        optimiser.step(schedule(progress, warmup=0.02), model.parameters())
        step, seen = step + 1, seen + batch
        if step % 20 == 0:
            shown = " ".join(f"{k} {v.item():.2f}" for k, v in accuracy.items())
            print(f"{step} {time.time() - began:.0f}s {seen} loss {loss.item():.3f} {shown} t{torch.get_num_threads()}", flush=True)
        if step % 100 == 0:
            _save(model, path, seen)
    _save(model, path, seen)


def _save(model: torch.nn.Module, path: Path, seen: int) -> None:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()} | {"samples": torch.tensor(seen)}, path)
