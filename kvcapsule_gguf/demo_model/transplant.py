"""The second model begins as the first one: the same decoder, and an eye whose attention has learned positions turned into 2D RoPE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..scenes import TRAIN, draw_scene, make_scene
from .decoder import Decoder
from .merger import MergerVision
from .train_eye import to_input
from .vision import Vision, VisionBlock

LEFT_OUT = 3  # block of the first decoder without which it reads best, measured one at a time
TURNING = 4  # of the frequencies of an axis: pairs that hold what depends on the offset; the slow rest holds content


@torch.no_grad()
def transplant_decoder(old: Decoder, new: Decoder) -> None:
    """Copy what has the same name, but for the block that is missed least: the first one becomes free. The vocabulary may have grown at its end."""
    kept = [i for i in range(old.cfg.layers) if i != LEFT_OUT]
    source = {n: p for n, p in old.named_parameters() if not n.startswith("blocks")}
    for at, i in enumerate(kept, 1):
        source |= {f"blocks.{at}.{n}": p for n, p in old.blocks[i].named_parameters()}
    for name, p in new.named_parameters():
        if name in source:
            p[: source[name].shape[0]] = source[name]


@torch.no_grad()
def transplant_eye(old: Vision, new: MergerVision, pictures: int = 24) -> None:
    """Fit the new eye to what the old one does on a few training pictures, block by block."""
    images = torch.from_numpy(np.stack([np.asarray(draw_scene(make_scene(s, dense=s % 4 != 0))) for s in TRAIN[:pictures]]))
    x = old.patch(to_input(images)).flatten(2).transpose(1, 2)
    new.patch.weight.copy_(old.patch.weight)
    seen = old.pre_ln(x + old.position)
    plain = x - old.patch.bias[None, None]  # the new eye has no bias here
    plain = nn.functional.layer_norm(plain, plain.shape[-1:], eps=new.cfg.eps)
    _fit_affine(new.pre_ln, plain, seen)
    for source, block in zip(old.blocks, new.blocks):
        block.load_state_dict(source.state_dict())
        _fit_attention(source, block, source.ln1(seen), old.cfg.grid, new.frequencies())
        seen = source(seen)
    new.post_ln.load_state_dict(old.post_ln.state_dict())
    _mean_of_patches(old, new)


def _fit_affine(norm: nn.LayerNorm, plain: Tensor, wanted: Tensor) -> None:
    """Weight and bias that bring `plain` closest to `wanted`, per channel."""
    a, b = plain.flatten(0, 1), wanted.flatten(0, 1)
    slope = ((a - a.mean(0)) * (b - b.mean(0))).mean(0) / a.var(0).clamp(min=1e-4)
    norm.weight.copy_(slope)
    norm.bias.copy_(b.mean(0) - slope * a.mean(0))


def _fit_attention(old: VisionBlock, new: VisionBlock, h: Tensor, grid: int, frequencies: Tensor) -> None:
    """Scores as a function of the offset become biases of turning pairs, scores by content the rest; h [B, grid^2, width]."""
    size = h.shape[-1] // old.heads
    pairs = size // 4
    place = h.mean(0)  # [grid^2, width]: what does not depend on the picture
    mean = place.mean(0)
    content = (h - place).flatten(0, 1)
    values, vectors = torch.linalg.eigh(content.T @ content / len(content) + 1e-4 * torch.eye(h.shape[-1]))
    root, inverse = (vectors * values**e @ vectors.T for e in (0.5, -0.5))
    slow = torch.tensor([i for i in range(size) if i % pairs >= TURNING])
    for head in range(old.heads):
        rows = slice(head * size, (head + 1) * size)
        (wq, bq), (wk, bk) = ((m.weight[rows], m.bias[rows]) for m in (old.q, old.k))
        scores = (place @ wq.T + bq) @ (place @ wk.T + bk).T
        wave_q, wave_k = _offset_biases(scores, grid, frequencies, size)
        aq, ak = (torch.cat([w @ root, (b + w @ mean)[:, None]], 1) for w, b in ((wq, bq), (wk, bk)))
        u, s, v = torch.linalg.svd(aq.T @ ak)
        for linear, side, wave in ((new.q, u, wave_q), (new.k, v.T, wave_k)):
            part = (side[:, : len(slow)] * s[: len(slow)].sqrt()).T
            weight = part[:, :-1] @ inverse
            linear.weight[rows] = 0.1 * linear.weight[rows].std() * torch.randn_like(linear.weight[rows])
            linear.bias[rows] = wave
            linear.weight[head * size + slow] = weight
            linear.bias[head * size + slow] = part[:, -1] - weight @ mean


def _offset_biases(scores: Tensor, grid: int, frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least squares of mean scores [grid^2, grid^2] by offset onto the turning pairs -> biases of q and k [size]."""
    at = torch.arange(grid * grid)
    dy, dx = (a[:, None] - a[None] for a in (at // grid, at % grid))
    index = ((dy + grid - 1) * (2 * grid - 1) + dx + grid - 1).flatten()
    total = torch.zeros((2 * grid - 1) ** 2).index_add_(0, index, scores.flatten())
    count = torch.zeros_like(total).index_add_(0, index, torch.ones(grid**4))
    mean = total / count
    span = torch.arange(1 - grid, grid).float()
    y, x = torch.meshgrid(span, span, indexing="ij")
    waves = [f(a.flatten() * w) for a in (y, x) for w in frequencies[:TURNING] for f in (torch.cos, torch.sin)]
    design = torch.stack([torch.ones_like(mean), *waves], 1)
    weight = (torch.softmax(mean / size**0.5, 0) + 0.1 / len(mean)).sqrt()[:, None] * count.sqrt()[:, None]
    ridge = 1e-4 * weight.square().sum() * torch.eye(design.shape[1])
    normal = (design * weight).T @ (design * weight) + ridge
    fit = torch.linalg.solve(normal, (design * weight).T @ (mean[:, None] * weight))[1:, 0].view(2, TURNING, 2)
    q, k = torch.zeros(size), torch.zeros(size)
    for axis in range(2):
        for i, (cos, sin) in enumerate(fit[axis]):
            gain, pair = torch.hypot(cos, sin).sqrt().clamp(min=1e-6), axis * (size // 4) + i
            k[pair] = gain
            q[pair], q[pair + size // 2] = cos / gain, -sin / gain
    return q, k


def _mean_of_patches(old: Vision, new: MergerVision) -> None:
    """The merger starts as the old projector on the mean of a token's patches; what is wider than that sees differences."""
    parts = new.cfg.merge**2
    hidden = old.mm0.out_features
    nn.init.normal_(new.mm0.weight, std=new.mm0.in_features**-0.5)
    nn.init.zeros_(new.mm0.bias)
    nn.init.normal_(new.mm2.weight, std=0.1 * new.mm2.in_features**-0.5)
    new.mm0.weight[:hidden] = old.mm0.weight.repeat(1, parts) / parts
    new.mm0.bias[:hidden] = old.mm0.bias
    new.mm2.weight[:, :hidden] = old.mm2.weight
    new.mm2.bias.copy_(old.mm2.bias)
