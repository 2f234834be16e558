"""The second model: pictures of many sizes, one or two of them before the questions; M-RoPE positions as libmtmd gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scenes import Question, Scene, compare_questions, draw_scene
from .config import MergerConfig, mrope_decoder
from .decoder import Decoder
from .labels import LABELS, patch_labels
from .merger import MergerVision
from .packing import IGNORE, attention_mask, pack, questions_for
from .tokenizer import VISION_TOKENS, Prompts, Tokenizer
from .train_eye import to_input
from .vision import PatchHeads

PLACES = ("row", "column")  # the eye can not know these: read off after the first attention, which can, by M-RoPE
SEEN = tuple(name for name in LABELS if name not in PLACES)
Size = tuple[int, int]  # width, height


class MixedModel(nn.Module):
    """Eye, decoder and training heads, which are not exported."""

    def __init__(self, prompts: Prompts, vision: MergerConfig = MergerConfig()):
        super().__init__()
        self.decoder = Decoder(mrope_decoder(len(prompts.tokenizer.pieces)))
        self.vision = MergerVision(vision, self.decoder.cfg.width)
        self.heads = PatchHeads(self.decoder.cfg.width)


def mixed_prompts() -> Prompts:
    """Prompts with the control tokens that libmtmd writes around a picture."""
    return Prompts(Tokenizer(VISION_TOKENS))


@dataclass
class MixedBatch:
    """One step: sequences whose pictures have the same sizes."""

    pictures: list[Tensor]  # uint8 [B, height, width, 3] each
    labels: Tensor  # int64 [B, len(LABELS), vision tokens]
    ids: Tensor  # [B, budget]
    targets: Tensor  # [B, budget]
    positions: Tensor  # [B, 3, T]: t, y, x
    mask: Tensor  # [B, 1, T, T]
    segments: np.ndarray  # [B, budget]

    def to(self, device: torch.device) -> MixedBatch:
        """The same batch elsewhere."""
        move = lambda v: v.to(device) if isinstance(v, Tensor) else [move(i) for i in v] if isinstance(v, list) else v  # noqa: E731
        return MixedBatch(**{k: move(v) for k, v in vars(self).items()})


def image_positions(start: int, size: Size, cell: int) -> tuple[np.ndarray, int]:
    """t, y, x of an image's tokens [3, tokens], and the position of what follows."""
    columns, rows = size[0] // cell, size[1] // cell
    y, x = np.divmod(np.arange(rows * columns), columns)
    return start + np.stack([np.zeros_like(y), y, x]), start + max(rows, columns)


def head_positions(prompts: Prompts, sizes: list[Size], cell: int) -> tuple[np.ndarray, np.ndarray, int]:
    """t, y, x of everything up to the question [3, T], which of it is image [T], and the position of what follows."""
    (before, after), parts, image, at = prompts.around_image(), [], [], 0

    def text(count: int) -> None:
        nonlocal at
        parts.append(np.tile(at + np.arange(count), (3, 1)))
        image.append(np.zeros(count, bool))
        at += count

    text(len(prompts.before_image()))
    for size in sizes:
        text(len(before))
        positions, at = image_positions(at, size, cell)
        parts.append(positions)
        image.append(np.ones(positions.shape[1], bool))
        text(len(after))
    return np.concatenate(parts, 1), np.concatenate(image), at


def pair_questions(first: Scene, second: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """Different questions about two pictures, in random order."""
    found = {q.prompt: q for _ in range(count) for q in compare_questions(first, second, int(rng.integers(1 << 30)))}
    questions = list(found.values())
    return [questions[i] for i in rng.permutation(len(questions))][:count]


def make_mixed(prompts: Prompts, rows: list[list[Scene]], sizes: list[Size], budget: int, rng: np.random.Generator,
               cell: int, questions: list[list[Question]] | None = None) -> MixedBatch:
    """Pack questions on the one or two scenes of each row, drawn at `sizes`."""
    fixed, image, start = head_positions(prompts, sizes, cell)
    texts = []
    for i, scenes in enumerate(rows):
        asked = questions[i] if questions else pair_questions(*scenes, budget // 12, rng) if len(scenes) > 1 else questions_for(scenes[0], budget // 10, rng)
        texts.append(pack(prompts, asked, budget, rng, multi_turn=questions is None))
    positions = [np.concatenate([fixed, np.tile(start + t.positions, (3, 1))], 1) for t in texts]
    labels = [np.concatenate([patch_labels(s, size, cell) for s, size in zip(scenes, sizes)], 1) for scenes in rows]
    pictures = [np.stack([np.asarray(draw_scene(scenes[i], size)) for scenes in rows]) for i, size in enumerate(sizes)]
    segments = np.stack([t.segment for t in texts])
    as_tensor = lambda items: torch.from_numpy(np.stack(items))  # noqa: E731
    return MixedBatch([torch.from_numpy(p) for p in pictures], as_tensor(labels), as_tensor([t.ids for t in texts]),
                      as_tensor([t.targets for t in texts]), as_tensor(positions),
                      torch.from_numpy(attention_mask(len(image), 0, segments, 0.0)), segments)


def embed_head(model: MixedModel, prompts: Prompts, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T, width] of all before the question, and which of them are image, bool [T]."""
    device, count = model.decoder.embed.weight.device, len(pictures[0])
    words = lambda ids: model.decoder.embed(torch.tensor(ids, dtype=torch.long, device=device)).expand(count, -1, -1)  # noqa: E731
    before, after = map(words, prompts.around_image())
    parts, image = [words(prompts.before_image())], []
    for picture in pictures:
        tokens = model.vision(to_input(picture)).to(before.dtype)
        parts += [before, tokens, after]
    for part in parts:
        image += [len(image) > 0 and part is not before and part is not after] * part.shape[1]
    return torch.cat(parts, 1), torch.tensor(image, device=device)


def forward_mixed(model: MixedModel, prompts: Prompts, batch: MixedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Answer loss, auxiliary loss and whether each target is met, bool [B, budget]."""
    start, image = embed_head(model, prompts, batch.pictures)
    x, found = torch.cat([start, model.decoder.embed(batch.ids)], 1), []
    if torch.is_grad_enabled():
        found.append(model.heads.loss(start[:, image], batch.labels, SEEN)[0])
        shown = lambda h: found.append(model.heads.loss(h[:, : len(image)][:, image], batch.labels, PLACES)[0])  # noqa: E731
    logits = model.decoder(x, batch.positions, batch.mask, batch.ids.shape[1], shown if found else None).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    return loss, sum(found, loss.new_zeros(())), logits.argmax(-1) == batch.targets
