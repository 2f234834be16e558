"""The second model's eye alone: each of its tokens learns to say what the first model's eye says of the four patches under it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..scenes import TRAIN, draw_scene, make_scene
from .labels import patch_labels
from .merger import MergerVision, grid_positions
from .mixed import MixedModel
from .optim import Optimisers, schedule
from .train_eye import to_input
from .vision import Vision
from .weights import save_weights

DISTIL_SEEDS = 3_000_000


def pictures(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures as the eye takes them and whether a patch shows an item, bool [count, 576]."""
    scenes = [make_scene(s, dense=s % 3 != 0, random_words=0.5) for s in range(start, start + count)]
    images = to_input(torch.from_numpy(np.stack([np.asarray(draw_scene(s)) for s in scenes])))
    return images, torch.from_numpy(np.stack([patch_labels(s)[1] > 0 for s in scenes]))


class Teacher:
    """What the old eye makes of a picture after each block, without what depends on the place alone."""

    def __init__(self, eye: Vision, merge: int, probes: int = 48):
        y, x = grid_positions(eye.cfg.grid, eye.cfg.grid, merge)
        self.eye, self.order = eye, y * eye.cfg.grid + x
        self.device = eye.position.device
        self.places: list[Tensor] = []
        probed = (self.stages(pictures(TRAIN.start + i, 4)[0].to(self.device)) for i in range(0, probes, 4))
        stages = [torch.cat(s) for s in zip(*probed)]
        self.places = [s.mean(0) - s.mean((0, 1)) for s in stages]

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[Tensor]:
        """After each block, then the projected tokens, [B, 576, width] in the merger's order."""
        x = self.eye.pre_ln(self.eye.patch(images).flatten(2).transpose(1, 2) + self.eye.position)
        out = [x := block(x) for block in self.eye.blocks]
        out.append(self.eye.project(self.eye.post_ln(x)))
        out = [s[:, self.order] for s in out]
        return [s - p for s, p in zip(out, self.places)] if self.places else out


def distillation_loss(eye: MergerVision, teacher: Teacher, images: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of all stages together and the part of the tokens' variance that is missed; items weigh ten times the background."""
    targets = teacher.stages(images)
    shown = shown[:, teacher.order].float()
    weight = (0.1 + 0.9 * shown)[..., None]
    stages = eye.stages(images)
    losses = [_missed(x, target, weight) for x, target in zip(stages, targets)]
    tokens = eye.project(eye.post_ln(stages[-1]))
    group = lambda a: a.unflatten(1, (-1, eye.cfg.merge**2))  # noqa: E731
    inside = group(weight)  # of a token at the edge of an item, the patches that show it count
    target = (group(targets[-1]) * inside).sum(2) / inside.sum(2)
    missed = _missed(tokens, target, group(weight).amax(2))
    return 2 * missed + 0.3 * sum(losses), missed.detach()


def _missed(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    centre = (target * weight).sum((0, 1)) / weight.sum()
    return ((x - target).square() * weight).sum() / ((target - centre).square() * weight).sum()


def train_distil(model: MixedModel, old: Vision, save_to: Path, minutes: float, batch: int = 6, lr: float = 2e-3, seed: int = 0) -> None:
    """Train the eye for so many minutes; the model is saved every hundred steps."""
    device = next(model.parameters()).device
    teacher = Teacher(old, model.vision.cfg.merge)
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("vision")]
    optimiser = Optimisers(named, lr, matrix_lr=1.5 * lr)
    began, step = time.time(), 0
    while (progress := (time.time() - began) / (minutes * 60)) < 1:
        images, shown = (t.to(device) for t in pictures(DISTIL_SEEDS + seed * 100_000 + step * batch, batch))
        loss, missed = distillation_loss(model.vision, teacher, images, shown)
        loss.backward()
        optimiser.step(schedule(progress), [p for _, p in named])
        step += 1
        if step % 10 == 0:
            print(f"{step} {time.time() - began:.0f}s {step * batch} pictures, loss {loss.item():.3f}, missed of tokens {missed.item():.3f}", flush=True)
        if step % 100 == 0:
            save_weights(model, save_to)
    save_weights(model, save_to)
