"""A head start for M-RoPE: the decoder's first attention says in which row and column of the picture a token is, as the first model's eye did.

An image token attends to <s> and to the <|vision_start|> before its picture and to nothing else. How much to which depends on the rows (two heads) or
columns (two heads) in between: each head is a step at one of the two borders of a picture of middle size.
"""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np
import torch
from torch import Tensor

from ..scenes import TRAIN, draw_scene, make_scene
from .decoder import Decoder
from .labels import LABELS, patch_labels
from .merger import MergerVision
from .tokenizer import BOS
from .train_eye import to_input
from .vision import Vision

BORDERS = 4.25, 8.4  # cells from <|vision_start|> (one before the first row or column) to the middle third, and to the last
STEEPNESS = 2.5  # of a step, in nats per cell
AHEAD = 12.0  # nats by which both anchors lead all other tokens


@torch.no_grad()
def place_block(decoder: Decoder, eye: MergerVision, teacher: Vision, vision_start: int, pictures: int = 24) -> list[list[Tensor]]:
    """Write the first block; the merger's bias becomes that of a token at the bottom right.

    Returns what a token gets for its third of the rows and of the columns, [width] each."""
    cfg, block = decoder.cfg, decoder.blocks[0]
    images, labels = _pictures(pictures)
    tokens = eye(images).flatten(0, 1)
    anchors = _anchors(decoder, tokens, vision_start)
    first_x, end = sum(cfg.sections[:2]), cfg.head_size // 2
    for p in (*block.q.parameters(), *block.k.parameters(), *block.v.parameters(), block.o.weight, block.down.weight):
        p.zero_()
    for norm in (block.attn_norm, block.ffn_norm):
        norm.weight.fill_(1.0)
    q = block.q.bias.view(cfg.heads, -1)
    k, v = (linear.weight.view(cfg.kv_heads, -1, cfg.width) for linear in (block.k, block.v))
    steps = _steps(teacher, images, labels)
    scale = cfg.head_size**0.25  # of q and of k each, so that a score is in nats
    for axis, pair in enumerate((first_x - 1, first_x)):  # the slowest pair of y and the fastest of x: far text sees no step
        frequency = cfg.rope_base ** (-2 * pair / cfg.head_size)
        height = (STEEPNESS / frequency) ** 0.5 * scale
        ahead = AHEAD**0.5 * scale
        k[axis, 2 * pair] = height * anchors[1]
        k[axis, 2 * end - 4] = ahead * anchors[1]
        k[axis, 2 * end - 2] = ahead * anchors[0]
        v[axis, 0] = anchors[1]
        for side, border in enumerate(BORDERS):
            phase, head = frequency * border - pi / 2, 2 * axis + side
            q[head, 2 * pair], q[head, 2 * pair + 1] = height * cos(phase), -height * sin(phase)
            q[head, 2 * end - 4] = q[head, 2 * end - 2] = ahead
            block.o.weight[:, head * cfg.head_size] = steps[axis][side] - steps[axis][side + 1]
    fill_unused(decoder)
    eye.mm2.bias += steps[0][2] + steps[1][2]
    return steps


@torch.no_grad()
def fill_unused(decoder: Decoder, seed: int = 0) -> None:
    """Random contents in the channels of keys and values that no query and no output of the first block looks at.

    The model computes the same, but its first layer's keys and values are like any others: nearly empty ones would be no measure of a cache's
    precision (q4_0 stores a token of one channel all but exactly)."""
    cfg, block = decoder.cfg, decoder.blocks[0]
    draw = torch.Generator().manual_seed(seed)
    group = cfg.heads // cfg.kv_heads
    seen_by_q = block.q.bias.view(cfg.kv_heads, group, -1).abs().sum(1) > 0  # [kv_heads, head_size]
    seen_by_o = block.o.weight.view(cfg.width, cfg.kv_heads, group, -1).abs().sum((0, 2)) > 0
    pairs = seen_by_q.unflatten(-1, (-1, 2)).any(-1).repeat_interleave(2, -1)  # RoPE turns the other half of a pair into view
    for linear, seen in ((block.k, pairs), (block.v, seen_by_o)):
        weight = linear.weight.view(cfg.kv_heads, cfg.head_size, cfg.width)
        contents = torch.randn(weight.shape, generator=draw) * cfg.width**-0.5
        weight.copy_(torch.where(seen[..., None], weight, contents))


def _pictures(count: int) -> tuple[Tensor, Tensor]:
    scenes = [make_scene(s, dense=True) for s in TRAIN[1000:1000 + count]]
    images = to_input(torch.from_numpy(np.stack([np.asarray(draw_scene(s)) for s in scenes])))
    return images, torch.from_numpy(np.stack([patch_labels(s) for s in scenes]))


def _steps(teacher: Vision, images: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """For rows and columns: what the old eye adds to the tokens of each third [width], around their mean."""
    tokens, out = teacher(images).flatten(0, 1), []
    for name in ("row", "column"):
        label = labels[:, list(LABELS).index(name)].flatten()
        means = torch.stack([tokens[label == third].mean(0) for third in (1, 2, 3)])
        out.append(list(means - means.mean(0)))
    return out


def _anchors(decoder: Decoder, tokens: Tensor, vision_start: int) -> Tensor:
    """Directions [2, width] whose product with a normed token is 1 for <s> or <|vision_start|> and about 0 for all else.

    The embedding of <|vision_start|> is put where other tokens have least."""
    embed = decoder.embed.weight
    words = embed[: vision_start]
    normed = torch.nn.functional.rms_norm(torch.cat([tokens, words.repeat(4, 1)]), words.shape[1:])
    spread = normed.T @ normed / len(normed) + 1e-4 * torch.eye(words.shape[1])
    embed[vision_start] = torch.linalg.eigh(spread).eigenvectors[:, 0] * words.norm(dim=1).mean()
    embed[vision_start + 1 :] = words.mean(0) + 0.5 * (words[BOS] - words.mean(0))
    wanted = torch.nn.functional.rms_norm(embed[[BOS, vision_start]], words.shape[1:])
    solved = torch.linalg.solve(spread, wanted.T)  # [width, 2]
    return torch.linalg.solve(wanted @ solved, solved.T)
