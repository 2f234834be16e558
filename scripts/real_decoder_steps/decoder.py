"""SmolLM2 from its GGUF file in torch, frozen, with an optional LoRA on the attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

HEADS, KV_HEADS, HEAD, LAYERS, WIDTH, EPS, ROPE_BASE = 9, 3, 64, 30, 576, 1e-5, 100_000.0
Q, KV = HEADS * HEAD, KV_HEADS * HEAD


@dataclass
class Prefix:
    """Keys (rotated) and values of the text before the pictures, a pair [1, KV_HEADS, n, HEAD] a layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    n: int


class Decoder:
    """Matrices in `dtype` (bf16 is twice as fast on CPUs that multiply it), the stream between layers in f32."""

    def __init__(self, file: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        t = {}
        for tensor in gguf.GGUFReader(file).tensors:
            a = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)))
            t[tensor.name] = a.to(dtype) if a.ndim == 2 else a
        self.dtype = dtype
        self.embedding = t["token_embd.weight"]
        self.output_norm = t["output_norm.weight"]
        self.layers = []
        for i in range(LAYERS):
            b = f"blk.{i}."
            q, k = (_halves(t[f"{b}attn_{x}.weight"]) for x in "qk")
            self.layers.append({
                "qkv": torch.cat([q, k, t[f"{b}attn_v.weight"]]), "o": t[f"{b}attn_output.weight"],
                "gate_up": torch.cat([t[f"{b}ffn_gate.weight"], t[f"{b}ffn_up.weight"]]), "down": t[f"{b}ffn_down.weight"],
                "norm1": t[f"{b}attn_norm.weight"], "norm2": t[f"{b}ffn_norm.weight"],
            })
        angle = torch.arange(4096).float()[:, None] / ROPE_BASE ** (torch.arange(0, HEAD, 2).float() / HEAD)
        self.cos, self.sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding[ids].float()

    def hidden(
        self, x: torch.Tensor, pos: torch.Tensor, bias: torch.Tensor | None, prefix: Prefix | None = None,
        lora: dict[str, torch.Tensor] | None = None, keep: list[tuple[torch.Tensor, torch.Tensor]] | None = None, real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, N, WIDTH] f32, pos [B, N], bias [B, 1, N, prefix.n + N] added to the scores (None: causal) -> [B, N, WIDTH], normed. keep takes keys and values.

        With `real` [B, N], what is False there fills up rows and costs attention only. Attention is in f32: its backward pass in bf16 takes five times as long.
        """
        B, N, _ = x.shape
        d = self.dtype
        cos, sin = self.cos[pos][:, None], self.sin[pos][:, None]
        rows = torch.arange(B * N) if real is None else real.flatten().nonzero()[:, 0]
        x = x.reshape(B * N, WIDTH).index_select(0, rows)

        def in_rows(y: torch.Tensor) -> torch.Tensor:
            return y if len(rows) == B * N else y.new_zeros(B * N, y.shape[1]).index_copy(0, rows, y)

        def rope(y: torch.Tensor) -> torch.Tensor:
            return y * cos + torch.cat([y[..., HEAD // 2:], y[..., :HEAD // 2]], -1) * sin

        for i, w in enumerate(self.layers):
            y = F.rms_norm(x, (WIDTH,), w["norm1"], EPS).to(d)
            qkv = F.linear(y, w["qkv"])
            if lora:
                qkv = qkv + F.linear(F.linear(y, lora[f"{i}.qkv.a"].to(d)), lora[f"{i}.qkv.b"].to(d))
            q, k, v = in_rows(qkv.float()).split([Q, KV, KV], -1)
            q, k = rope(q.view(B, N, HEADS, HEAD).transpose(1, 2)), rope(k.view(B, N, KV_HEADS, HEAD).transpose(1, 2))
            v = v.view(B, N, KV_HEADS, HEAD).transpose(1, 2)
            if keep is not None:
                keep.append((k, v))
            if prefix:
                before = prefix.layers[i]
                k, v = (torch.cat([a.expand(B, -1, -1, -1), b], 2) for a, b in zip(before, (k, v)))
            k, v = (a.repeat_interleave(HEADS // KV_HEADS, 1) for a in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None).transpose(1, 2).reshape(B * N, Q).index_select(0, rows).to(d)
            o = F.linear(y, w["o"])
            if lora:
                o = o + F.linear(F.linear(y, lora[f"{i}.o.a"].to(d)), lora[f"{i}.o.b"].to(d))
            x = x + o.float()
            gate, up = F.linear(F.rms_norm(x, (WIDTH,), w["norm2"], EPS).to(d), w["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"]).float()
        return in_rows(F.rms_norm(x, (WIDTH,), self.output_norm, EPS)).view(B, N, WIDTH)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.to(self.dtype), self.embedding).float()

    @torch.no_grad()
    def prefix(self, ids: list[int], lora: dict[str, torch.Tensor] | None = None) -> Prefix:
        keep: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hidden(self.embed(torch.tensor([ids])), torch.arange(len(ids))[None], None, lora=lora, keep=keep)
        return Prefix(keep, len(ids))


def _halves(w: torch.Tensor) -> torch.Tensor:
    """Rows of a GGUF's q or k (pairs of neighbours turn together) -> rows of which the two halves of a head turn together."""
    return w.view(-1, HEAD // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def pairs(w: np.ndarray) -> np.ndarray:
    """The opposite of _halves, for rows that go back into a GGUF."""
    return w.reshape(-1, 2, HEAD // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def new_lora(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """a [rank, in], b [out, rank], of which b is zero: at first nothing changes."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for i in range(LAYERS):
        for name, rows in (("qkv", Q + 2 * KV), ("o", WIDTH)):
            out[f"{i}.{name}.a"] = torch.randn(rank, WIDTH, generator=rng) / WIDTH**0.5
            out[f"{i}.{name}.b"] = torch.zeros(rows, rank)
    return out
