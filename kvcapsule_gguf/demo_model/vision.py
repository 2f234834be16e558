"""The eye: ViT and projector, op for op what llama.cpp's tools/mtmd/models/llava.cpp computes."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MergerConfig, VisionConfig
from .labels import LABELS


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on pairs (i, i + head_size / 2); x [B, H, N, head_size]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class VisionBlock(nn.Module):
    """Pre-norm block: full self-attention, GELU (tanh) feed-forward."""

    def __init__(self, cfg: VisionConfig | MergerConfig):
        super().__init__()
        d = cfg.width
        self.heads = cfg.heads
        self.ln1, self.ln2 = nn.LayerNorm(d, cfg.eps), nn.LayerNorm(d, cfg.eps)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, cfg.ffn), nn.Linear(cfg.ffn, d)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, N, width] -> the same shape; rope: cos and sin [N, head_size / 2] of halves that turn together."""
        batch, tokens, width = x.shape
        h = self.ln1(x)
        q, k, v = (f(h).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if rope:
            q, k = rotate_halves(q, *rope), rotate_halves(k, *rope)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o(h.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class Vision(nn.Module):
    """ViT followed by LLaVA's two-layer projector."""

    def __init__(self, cfg: VisionConfig, out_width: int):
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch)
        self.position = nn.Parameter(torch.randn(cfg.tokens, cfg.width) * 0.02)
        self.pre_ln, self.post_ln = nn.LayerNorm(cfg.width, cfg.eps), nn.LayerNorm(cfg.width, cfg.eps)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.layers))
        self.mm0 = nn.Linear(cfg.width, out_width)
        self.mm2 = nn.Linear(out_width, out_width)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start attention as a soft convolution: heads look at fixed offsets by way of sinusoid positions."""
        cfg = self.cfg
        for block in self.blocks:
            for linear in (block.q, block.k, block.v, block.o, block.up, block.down):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5 * 0.7)
                nn.init.zeros_(linear.bias)
            for linear in (block.o, block.down):
                linear.weight.data.mul_(0.4)
        freq = 2 * math.pi / torch.logspace(math.log10(4.5), math.log10(48), 8)
        steps = torch.arange(cfg.grid).float()[:, None] * freq
        wave = torch.cat([steps.sin(), steps.cos()], -1)  # [grid, 16]
        code = torch.cat([wave[None].expand(cfg.grid, -1, -1), wave[:, None].expand(-1, cfg.grid, -1)], -1)
        channels = code.shape[-1]  # 32: x then y
        self.position.data[:, :channels] = code.reshape(cfg.tokens, channels)
        self.patch.weight.data[:channels] *= 0.05
        size = cfg.width // cfg.heads
        for depth, block in enumerate(self.blocks):
            reach = 1.2 + 0.6 * depth
            offsets = [(0, 0), (reach, 0), (-reach, 0), (0, reach), (0, -reach)]
            for head, (dx, dy) in enumerate(offsets[: cfg.heads - 1]):
                rows = slice(head * size, (head + 1) * size)
                for linear in (block.q, block.k):
                    linear.weight.data[rows] *= 0.15
                gain = (1.5 if head else 1.1) * math.sqrt(math.sqrt(size) / 2)
                for axis, shift in enumerate((dx, dy)):
                    for f in range(8):
                        s, c = axis * 16 + f, axis * 16 + 8 + f
                        cos, sin = math.cos(freq[f] * shift), math.sin(freq[f] * shift)
                        q, k = block.q.weight.data[rows], block.k.weight.data[rows]
                        q[s, s] += gain * cos
                        q[s, c] += gain * sin
                        q[c, c] += gain * cos
                        q[c, s] -= gain * sin
                        k[s, s] += gain
                        k[c, c] += gain

    def features(self, images: Tensor) -> Tensor:
        """images [B, 3, 336, 336] in [-1, 1] -> ViT features [B, 576, width]."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        x = self.pre_ln(x)
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)

    def project(self, features: Tensor) -> Tensor:
        """features [B, N, width] -> embeddings for the decoder [B, N, out_width]."""
        return self.mm2(F.gelu(self.mm0(features), approximate="tanh"))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.features(images))


class PatchHeads(nn.Module):
    """Linear read-outs of LABELS from projected tokens; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, sum(LABELS.values()))

    def loss(self, tokens: Tensor, labels: Tensor, names: Collection[str] = LABELS) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, N, width], labels [B, len(LABELS), N] -> mean loss of the named and per-label accuracy where labelled."""
        total, accuracy = tokens.new_zeros(()), {}
        seen = labels[:, 1] > 0
        weight = torch.where(seen, 1.0, 0.25)
        weight = torch.where(labels[:, 2] > 0, 2.0, weight).flatten()  # letters are hardest
        for i, (name, logits) in enumerate(zip(LABELS, self.out(tokens).float().split(list(LABELS.values()), -1))):
            if name not in names:
                continue
            target = labels[:, i]
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            total = total + (each * weight).sum() / weight.sum() * (2.0 if name == "kind" else 1.0)
            mask = target > 0
            accuracy[name] = ((logits.argmax(-1) == target) & mask).sum() / mask.sum().clamp(min=1)
            if name == "kind":
                glyph = target > 16
                accuracy["letter"] = ((logits.argmax(-1) == target) & glyph).sum() / glyph.sum().clamp(min=1)
        return total, accuracy
