"""Vision tower, decoder and auxiliary heads as one module, and batches for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scenes import Question, Scene
from .config import DecoderConfig, VisionConfig
from .decoder import Decoder
from .labels import patch_labels
from .packing import IGNORE, attention_mask, pack, questions_for
from .tokenizer import Prompts
from .vision import PatchHeads, Vision


class DemoModel(nn.Module):
    """The whole model; `heads` serve training only and are not exported."""

    def __init__(self, vocab: int, vision: VisionConfig = VisionConfig()):
        super().__init__()
        self.decoder = Decoder(DecoderConfig(vocab))
        self.vision = Vision(vision, self.decoder.cfg.width)
        self.heads = PatchHeads(self.decoder.cfg.width)


@dataclass
class Batch:
    """Arrays of one training or evaluation step."""

    features: Tensor  # [B, image, width] of the image tokens shown, or pictures [B, 3, 336, 336]
    labels: Tensor  # [B, len(LABELS), image]
    ids: Tensor  # [B, budget]
    targets: Tensor  # [B, budget]
    positions: Tensor  # [B, prefix + image + budget]
    mask: Tensor  # [B, 1, T, T]
    segments: np.ndarray  # [B, budget]


def choose_tokens(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the image's tokens in order: centres of items, then likely ones on items; early training sees fewer.

    labels [len(LABELS), 576] as patch_labels gives them.
    """
    if count >= labels.shape[1]:
        return np.arange(labels.shape[1])
    weight = np.where(labels[1] > 0, 10.0, 1.0) + labels[5] * 1e6  # all centres, so that counting can be learned
    lot = np.log(rng.random(len(weight))) / weight
    return np.sort(np.argpartition(-lot, count)[:count])


def make_batch(prompts: Prompts, scenes: list[Scene], features: list[np.ndarray], image: int, budget: int,
               rng: np.random.Generator, questions: list[list[Question]] | None = None) -> Batch:
    """Pack questions on each scene; features are [576, width] each."""
    prefix = len(prompts.before_image())
    rows = []
    for i, (scene, feature) in enumerate(zip(scenes, features)):
        labels = patch_labels(scene)
        chosen = choose_tokens(labels, image, rng)
        asked = questions[i] if questions else questions_for(scene, budget // 10, rng)
        packed = pack(prompts, asked, budget, rng, multi_turn=questions is None)
        positions = np.concatenate([np.arange(prefix), prefix + chosen, prefix + labels.shape[1] + packed.positions])
        rows.append((np.asarray(feature)[chosen], labels[:, chosen], packed, positions))
    segments = np.stack([r[2].segment for r in rows])
    bias = 0.7 * float(np.log(576 / image)) if image < 576 else 0.0
    as_tensor = lambda items: torch.from_numpy(np.stack(items))  # noqa: E731
    return Batch(as_tensor([r[0] for r in rows]).float(), as_tensor([r[1] for r in rows]),
                 as_tensor([r[2].ids for r in rows]), as_tensor([r[2].targets for r in rows]),
                 as_tensor([r[3] for r in rows]), torch.from_numpy(attention_mask(prefix, image, segments, bias)), segments)


def forward(model: DemoModel, prompts: Prompts, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Answer loss, auxiliary loss and whether each target is met, bool [B, budget]."""
    count, budget = batch.ids.shape
    seen = model.vision.features(batch.features) if batch.features.ndim == 4 else batch.features
    tokens = model.vision.project(seen)
    start = model.decoder.embed(torch.tensor(prompts.before_image(), device=tokens.device)).expand(count, -1, -1)
    x = torch.cat([start, tokens.to(start.dtype), model.decoder.embed(batch.ids)], 1)
    logits = model.decoder(x, batch.positions, batch.mask, budget).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    eye = model.heads.loss(tokens, batch.labels)[0] if tokens.requires_grad else loss.new_zeros(())
    return loss, eye, logits.argmax(-1) == batch.targets
