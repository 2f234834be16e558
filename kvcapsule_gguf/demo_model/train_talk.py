"""Phase 2: the decoder on cached ViT features, few image tokens first, then all 576; phase 3: everything together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from ..scenes import HELD_OUT, TRAIN, Question, Scene, draw_scene, make_questions, make_scene
from .features import FeatureStore, training_scene
from .optim import Optimisers, schedule
from .scoring import Scores
from .talk import Batch, DemoModel, forward, make_batch
from .threads import spare_threads
from .tokenizer import Prompts
from .train_eye import to_input
from .weights import save_weights

# (share of the time, image tokens shown, pictures per step)
STAGES = ((0.3, 32, 6), (0.15, 96, 6), (0.27, 192, 6), (0.28, 576, 4))
NOT_SEEN = np.zeros((576, 1))  # in place of features where the eye itself looks
LIVE_SEEDS = 7_000_000  # pictures drawn while training everything; apart from those of the other phases


def stage(progress: float) -> tuple[int, int]:
    """Image tokens and pictures per step at a point of the training."""
    for share, image, batch in STAGES:
        if progress < share:
            return image, batch
        progress -= share
    return STAGES[-1][1:]


def pictures_of(scenes: list[Scene]) -> torch.Tensor:
    """What the eye takes in, [B, 3, 336, 336]."""
    return to_input(torch.from_numpy(np.stack([np.asarray(draw_scene(s)) for s in scenes])))


@torch.no_grad()
def held_out_score(model: DemoModel, prompts: Prompts, store: FeatureStore | None, scenes: int = 24, image: int = 576) -> dict[str, float]:
    """Exact match per task on held-out scenes: every answer token, end included, is the most likely one.

    Without a `store` of features the model's own eye looks at the pictures."""
    scores = Scores()
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)
    for at in range(0, scenes, 8):
        seeds = [HELD_OUT.start + i for i in range(at, min(at + 8, scenes))]
        drawn = [make_scene(s) for s in seeds]
        asked: list[list[Question]] = [make_questions(s, 14) for s in drawn]
        batch = make_batch(prompts, drawn, [store[s] if store else NOT_SEEN for s in seeds], image, 256, rng, asked)
        if store is None:
            batch.features = pictures_of(drawn)
        _, _, right = forward(model, prompts, to_device(batch, device))
        scores.add(right, batch.targets, batch.segments, asked)
    return scores.shares()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch elsewhere."""
    return Batch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})


def train_talk(model: DemoModel, prompts: Prompts, features: Path, held_out: Path, save_to: Path, minutes: float,
               lr: float = 1.5e-3, matrix_lr: float = 5e-3, budget: int = 256, seed: int = 0, on_save=None,
               begin: float = 0.0, live: bool = False) -> None:
    """Train for so many minutes; `begin` skips ahead in the schedule (0.75: full resolution only).

    `live` trains the ViT too, on pictures drawn on the way, instead of cached features.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    store, test = (None, None) if live else (FeatureStore(features), FeatureStore(held_out))
    trained = [(n, p) for n, p in model.named_parameters() if live or n.startswith("decoder")]
    for name, p in model.named_parameters():
        p.requires_grad_(live or name.startswith("decoder"))
    parameters = [p for _, p in trained]
    optimiser = Optimisers(trained, lr, matrix_lr)
    began, step, pictures = time.time(), 0, 0
    while (progress := begin + (1 - begin) * (time.time() - began) / (minutes * 60)) < 1:
        if step % 5 == 0 and device.type == "cpu":
            torch.set_num_threads(spare_threads())
        if step % 20 == 0 and not live:
            store.refresh()
            seeds = store.seeds()
        image, count = (576, STAGES[-1][2]) if live else stage(progress)
        chosen = rng.integers(LIVE_SEEDS, TRAIN.stop, count).tolist() if live else rng.choice(seeds, count, replace=False).tolist()
        scenes = [training_scene(s) for s in chosen]
        batch = make_batch(prompts, scenes, [NOT_SEEN] * count if live else [store[s] for s in chosen], image, budget, rng)
        if live:
            batch.features = pictures_of(scenes)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss, eye, right = forward(model, prompts, to_device(batch, device))
        (loss + 0.1 * eye if live else loss).backward()
        optimiser.step(schedule(progress) * min(1.0, (step + 1) / 20), parameters)
        step, pictures = step + 1, pictures + count
        if step % 10 == 0:
            met = right.cpu()[batch.targets >= 0].float().mean()
            print(f"{step} {time.time() - began:.0f}s {pictures} of {0 if live else len(seeds)} image {image} loss {loss.item():.3f} "
                  f"eye {eye.item():.2f} tokens {met:.3f} threads {torch.get_num_threads()}", flush=True)
        if step % 100 == 0:
            scores = held_out_score(model, prompts, test, image=image)
            print("held out:", " ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
            save_weights(model, save_to)
            if on_save:
                on_save(model)
    save_weights(model, save_to)
