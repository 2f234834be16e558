"""The eye of the second model: ViT with 2D RoPE and the 2 x 2 merger, op for op what llama.cpp's tools/mtmd/models/qwen2vl.cpp computes."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MergerConfig
from .vision import VisionBlock


@lru_cache(maxsize=64)
def grid_positions(rows: int, columns: int, merge: int) -> Tensor:
    """y and x of each patch [2, rows * columns], in the order that puts the patches of a token side by side."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    blocks = [p.view(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten() for p in (y, x)]
    return torch.stack(blocks)


class MergerVision(nn.Module):
    """Patches (the sum of both temporal kernels), blocks, merger."""

    def __init__(self, cfg: MergerConfig, out_width: int):
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=False)
        self.pre_ln, self.post_ln = nn.LayerNorm(cfg.width, cfg.eps), nn.LayerNorm(cfg.width, cfg.eps)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.layers))
        self.mm0 = nn.Linear(cfg.width * cfg.merge**2, cfg.hidden)
        self.mm2 = nn.Linear(cfg.hidden, out_width)

    def frequencies(self) -> Tensor:
        """Radians per patch along one axis [head_size / 4]."""
        pairs = self.cfg.width // self.cfg.heads // 4
        return self.cfg.rope_base ** -(torch.arange(pairs).float() / pairs)

    def rope(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [patches, head_size / 2]: the first half of the pairs turns with y, the second with x."""
        y, x = grid_positions(rows, columns, self.cfg.merge).float()[..., None] * self.frequencies()
        angles = torch.cat([y, x], -1).to(device)
        return angles.cos(), angles.sin()

    def stages(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, height, width] in [-1, 1] -> after each block [B, patches, width], the patches of a token side by side."""
        x = self.patch(images)
        rows, columns = x.shape[-2:]
        y_at, x_at = grid_positions(rows, columns, self.cfg.merge).to(x.device)
        x = self.pre_ln(x[:, :, y_at, x_at].transpose(1, 2))
        rope = self.rope(rows, columns, x.device)
        return [x := block(x, rope) for block in self.blocks]

    def features(self, images: Tensor) -> Tensor:
        """ViT features [B, patches, width]."""
        return self.post_ln(self.stages(images)[-1])

    def project(self, features: Tensor) -> Tensor:
        """features [B, patches, width] -> tokens of the decoder [B, patches / 4, out_width]."""
        merged = features.unflatten(1, (-1, self.cfg.merge**2)).flatten(2)
        return self.mm2(F.gelu(self.mm0(merged), approximate="tanh"))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.features(images))
