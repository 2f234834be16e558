"""The decoder, op for op what llama.cpp's `llama` and `qwen2vl` archs compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig


def rope_tables(positions: Tensor, cfg: DecoderConfig) -> tuple[Tensor, Tensor]:
    """positions [B, T], or t, y, x [B, 3, T] where the decoder has sections -> cos, sin [B, 1, T, head_size / 2]."""
    steps = torch.arange(0, cfg.head_size, 2, device=positions.device).float() / cfg.head_size
    if cfg.sections:
        each = torch.repeat_interleave(torch.arange(3), torch.tensor(cfg.sections[:3])).to(positions.device)
        turning = positions[:, each].transpose(1, 2)[:, None].float()
    else:
        turning = positions.float()[:, None, :, None]
    angles = turning * cfg.rope_base**-steps
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs (2i, 2i + 1), llama.cpp's NORM kind; x [B, H, T, head_size]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class DecoderBlock(nn.Module):
    """Grouped-query attention and SwiGLU, both pre-norm."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        d, self.cfg = cfg.width, cfg
        self.attn_norm, self.ffn_norm = nn.RMSNorm(d, cfg.eps), nn.RMSNorm(d, cfg.eps)
        self.q = nn.Linear(d, cfg.heads * cfg.head_size, bias=cfg.bias)
        self.k = nn.Linear(d, cfg.kv_heads * cfg.head_size, bias=cfg.bias)
        self.v = nn.Linear(d, cfg.kv_heads * cfg.head_size, bias=cfg.bias)
        self.o = nn.Linear(cfg.heads * cfg.head_size, d, bias=False)
        self.gate, self.up = nn.Linear(d, cfg.ffn, bias=False), nn.Linear(d, cfg.ffn, bias=False)
        self.down = nn.Linear(cfg.ffn, d, bias=False)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, tail: int) -> Tensor:
        """x [B, T, width], mask [B or 1, 1, T, T] added to scores -> the last `tail` positions [B, tail, width]."""
        batch, tokens, _ = x.shape
        cos, sin = rope
        h = self.attn_norm(x)
        q = self.q(h[:, -tail:]).view(batch, tail, self.cfg.heads, -1).transpose(1, 2)
        k = self.k(h).view(batch, tokens, self.cfg.kv_heads, -1).transpose(1, 2)
        v = self.v(h).view(batch, tokens, self.cfg.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos[:, :, -tail:], sin[:, :, -tail:]), rotate(k, cos, sin)
        group = self.cfg.heads // self.cfg.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, -tail:].to(q.dtype))
        return x[:, -tail:] + self.o(h.transpose(1, 2).reshape(batch, tail, -1))

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward part, x [B, T, width]."""
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Token embeddings, blocks, final norm and output."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, cfg.eps)
        self.output = nn.Linear(cfg.width, cfg.vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=0.3)
        for block in self.blocks:
            for linear in (block.q, block.k, block.v, block.gate, block.up):
                nn.init.normal_(linear.weight, std=cfg.width**-0.5 * 0.7)
            for linear in (block.o, block.down):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5 * 0.3)
            for linear in (block.q, block.k, block.v):
                if cfg.bias:
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.output.weight, std=0.02)
        for block in self.blocks:
            self._attend_to_alike(block)

    @torch.no_grad()
    def _attend_to_alike(self, block: DecoderBlock, span: int = 700) -> None:
        """Queries begin equal to keys where RoPE hardly turns within `span`, outputs as copies of what is attended:
        a word begins by looking at tokens like it, and vision tokens begin near the words for what they show."""
        cfg = self.cfg
        first = next(i for i in range(cfg.head_size // 2) if span * cfg.rope_base ** (-2 * i / cfg.head_size) < 1)
        slow = slice(2 * first, cfg.head_size)
        q, k, v = (w.weight.view(-1, cfg.head_size, cfg.width) for w in (block.q, block.k, block.v))
        o = block.o.weight.view(cfg.width, cfg.heads, cfg.head_size)
        k[:, slow] *= 1.6
        for head in range(cfg.heads):
            kv = head * cfg.kv_heads // cfg.heads
            q[head, slow] = k[kv, slow]
            o[:, head] += 0.5 * v[kv].T

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, tail: int, watch: Callable[[Tensor], None] | None = None) -> Tensor:
        """x [B, T, width] embeddings, positions as rope_tables takes them, mask [B or 1, 1, T, T] -> logits [B, tail, vocab].

        `watch` is shown what the first attention made of x.
        """
        rope = rope_tables(positions, self.cfg)
        for i, block in enumerate(self.blocks):
            x = block.attend(x, rope, mask, tail if i == len(self.blocks) - 1 else x.shape[1])
            if watch and i == 0:
                watch(x)
            x = block.feed(x)
        return self.output(self.norm(x))

    def causal(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Plain causal logits [B, T, vocab] of embeddings x [B, T, width], at positions 0, 1, ... unless given."""
        tokens = x.shape[1]
        mask = torch.full((1, 1, tokens, tokens), float("-inf"), device=x.device).triu(1)
        if positions is None:
            positions = torch.arange(tokens, device=x.device).expand(x.shape[0], -1)
        return self(x, positions, mask, tokens)
