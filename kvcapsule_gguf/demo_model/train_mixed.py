"""Training of the second model: eye and decoder together on fresh pictures of mixed sizes, one or two per prompt."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from ..scenes import HELD_OUT, TRAIN, compare_questions, make_questions, make_scene, random_size
from .features import training_scene
from .mixed import MixedBatch, MixedModel, forward_mixed, make_mixed
from .optim import Optimisers, schedule
from .scoring import Scores
from .tokenizer import Prompts
from .weights import save_weights

MIXED_SEEDS = 7_500_000
FROZEN = tuple(f"decoder.blocks.0.{part}." for part in ("attn_norm", "q", "k", "v", "o"))  # places.py: steep, a few steps of Muon blur them


def training_batch(prompts: Prompts, rng: np.random.Generator, count: int, budget: int, cell: int, pairs: float = 0.4) -> MixedBatch:
    """`count` sequences of one picture, or, in a share `pairs` of the batches, fewer of two."""
    pair = rng.random() < pairs
    rows = max(1, count * 3 // 4) if pair else count
    seeds = rng.integers(MIXED_SEEDS, TRAIN.stop, (rows, 1 + pair)).tolist()
    sizes = [random_size(rng) for _ in range(1 + pair)]
    return make_mixed(prompts, [[training_scene(s) for s in row] for row in seeds], sizes, budget, rng, cell)


def held_out_batches(prompts: Prompts, scenes: int, cell: int):
    """Batches with the questions of each row: single pictures, then pairs; sizes in turn."""
    rng = np.random.default_rng(0)
    for at in range(0, scenes, 4):
        rows = [[make_scene(HELD_OUT.start + at + i)] for i in range(4)]
        asked = [make_questions(row[0], 14) for row in rows]
        yield make_mixed(prompts, rows, [random_size(rng)], 256, rng, cell, asked), asked
        rows = [[a[0], b[0]] for a, b in zip(rows, rows[1:])][::2]
        asked = [compare_questions(*row) for row in rows]
        yield make_mixed(prompts, rows, [random_size(rng), random_size(rng)], 128, rng, cell, asked), asked


@torch.no_grad()
def score(model: MixedModel, prompts: Prompts, scenes: int = 24) -> dict[str, float]:
    """Exact match per task on held-out scenes: every answer token, end included, is the most likely one."""
    scores = Scores()
    for batch, asked in held_out_batches(prompts, scenes, model.vision.cfg.cell):
        _, _, right = forward_mixed(model, prompts, batch.to(model.decoder.embed.weight.device))
        scores.add(right, batch.targets, batch.segments, asked)
    return scores.shares()


class TrainingBatches(torch.utils.data.IterableDataset):
    """Endless batches (arguments as training_batch takes them), different in each worker."""

    def __init__(self, prompts: Prompts, seed: int, *arguments: float):
        self.arguments, self.prompts, self.seed = arguments, prompts, seed

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, info.id if info else 0])
        torch.set_num_threads(1)
        while True:
            yield training_batch(self.prompts, rng, *self.arguments)


def train_mixed(model: MixedModel, prompts: Prompts, save_to: Path, minutes: float, lr: float = 1.5e-3, matrix_lr: float = 3e-3, batch: int = 4,
                budget: int = 448, seed: int = 0, begin: float = 0.0, workers: int = 0, pairs: float = 0.4, aux: float = 0.1) -> None:
    """Train for so many minutes; `begin` skips ahead in the schedule. Saves every 50 steps: give the same folder to go on."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    batches = TrainingBatches(prompts, seed, batch, budget, model.vision.cfg.cell, pairs)
    data = iter(torch.utils.data.DataLoader(batches, None, num_workers=workers))
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(FROZEN))
    parameters = list(model.parameters())
    optimiser = Optimisers(list(model.named_parameters()), lr, matrix_lr)
    began, step, sums = time.time(), 0, defaultdict(float)
    while (progress := begin + (1 - begin) * (time.time() - began) / (minutes * 60)) < 1:
        now = next(data).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss, eye, right = forward_mixed(model, prompts, now)
        (loss + aux * eye).backward()
        optimiser.step(schedule(progress) * min(1.0, (step + 1) / 20), parameters)
        step += 1
        met = right[now.targets >= 0].float().mean()
        for name, value in (("loss", loss), ("eye", eye), ("tokens", met)):
            sums[name] += value.item() / 10
        if step % 10 == 0:
            print(f"{step} {time.time() - began:.0f}s", " ".join(f"{k} {v:.3f}" for k, v in sums.items()), flush=True)
            sums.clear()
        if step % 50 == 0:
            save_weights(model, save_to)
        if step % 100 == 0:
            print("held out:", " ".join(f"{k} {v:.2f}" for k, v in score(model, prompts).items()), flush=True)
    save_weights(model, save_to)
