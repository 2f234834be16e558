"""A decoder in torch, f32, from a GGUF file: what a compressed picture does to the answers (architectures llama, qwen2 and qwen2vl).

Keys, values and queries come from the same forward pass, so that nothing but the codec lies between two rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

from ..codec.rope import angles, pair_index
from ..format.base_model import BaseModel, read_base_model
from ..train.source import KVSample

# number of the layer, K [n, H, d] without RoPE, V [n, H, d] -> K and V as they are read
Store = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# K with RoPE [T, H, d], V [T, H, d] of all cells, which of them are the picture's -> K and V as they are read
Cells = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Shown:
    """Text before a picture, its vision tokens f32 [n, width], and the width of their grid in tokens."""

    before: list[int]
    embd: np.ndarray
    width: int


@dataclass
class Cache:
    """Per layer K f32 [T, H, d] without RoPE and V f32 [T, H, d], the positions of all tokens, and where the picture lies."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    positions: np.ndarray
    picture: slice
    width: int


class Decoder:
    def __init__(self, path: Path) -> None:
        self.model: BaseModel = read_base_model(path)
        reader = gguf.GGUFReader(path)
        self.w = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}
        field = reader.fields[f"{self.model.architecture}.attention.layer_norm_rms_epsilon"]
        self.eps = float(field.parts[field.data[0]][0])
        self.embed = self.w["token_embd.weight"]
        self.output = self.w.get("output.weight", self.embed)
        self.grid = self.model.rope_type in ("mrope", "imrope")
        self.cells: Cells | None = None  # the cache's type, for what follows a picture

    @torch.no_grad()
    def show(self, shown: Shown) -> Cache:
        """Reads text and picture, causally."""
        x = torch.cat([self.embed[shown.before], torch.from_numpy(shown.embd)])
        start, n = len(shown.before), len(shown.embd)
        pos = np.arange(start + n)
        if self.grid:
            pos = np.stack([pos, pos, pos, 0 * pos], 1)
            y, xx = np.divmod(np.arange(n), shown.width)
            pos[start:] = np.stack([0 * y, y, xx, 0 * y], 1) + [start, start, start, 0]
        empty = [torch.zeros(0, 1, 1)] * self.model.block_count
        cache = Cache(list(empty), list(empty), pos[:0], slice(start, start + n), shown.width)
        self._run(x, pos, cache)
        return cache

    def next_position(self, cache: Cache) -> int:
        return int(cache.positions[:, 0:3].max()) + 1 if self.grid else len(cache.positions)

    @torch.no_grad()
    def branches(self, cache: Cache, texts: Sequence[Sequence[int]], queries: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Hidden states [len(text), width] of several texts, each right after the cache and none seeing another; the cache stays as it is.

        `output` times a hidden state are the logits. queries: those of all texts are appended, a tensor [T, heads, d] with RoPE for each layer.
        """
        lengths = [len(t) for t in texts]
        pos = self.next_position(cache) + np.concatenate([np.arange(n) for n in lengths])
        if self.grid:
            pos = np.stack([pos, pos, pos, 0 * pos], 1)
        own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()
        h = self._run(self.embed[[t for text in texts for t in text]], pos, self.fork(cache), queries, own)
        return list(h.split(lengths))

    @staticmethod
    def fork(cache: Cache, store: Store | None = None) -> Cache:
        """The same cache, with the picture's keys and values as `store` reads them."""
        keys, values = list(cache.keys), list(cache.values)
        if store:
            for i, (k, v) in enumerate(zip(keys, values)):
                pair = store(i, k[cache.picture].numpy(), v[cache.picture].numpy())
                keys[i], values[i] = k.clone(), v.clone()
                keys[i][cache.picture], values[i][cache.picture] = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in pair)
        return Cache(keys, values, cache.positions, cache.picture, cache.width)

    def sample(self, cache: Cache, questions: Sequence[Sequence[int]]) -> KVSample:
        """What the study measures: the picture's keys and values, and the queries (with RoPE) of questions that follow."""
        queries: list[torch.Tensor] = []
        self.branches(cache, questions, queries)
        at = cache.picture
        keys, values = ([x[at].numpy().copy() for x in part] for part in (cache.keys, cache.values))
        return KVSample(keys, values, [q.numpy() for q in queries], cache.width, at.start)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[name], self.eps)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _turn(self, x: torch.Tensor, pos: np.ndarray, layer: int) -> torch.Tensor:
        m = self.model
        a = torch.from_numpy(angles(pos, m.rope_type, m.rope_dimensions, m.freq_base[layer], m.rope_sections, m.freq_factors)).float()[:, None]
        first, second = pair_index(m.rope_type, m.rope_dimensions).T
        out, cos, sin = x.clone(), a.cos(), a.sin()
        out[..., first], out[..., second] = x[..., first] * cos - x[..., second] * sin, x[..., first] * sin + x[..., second] * cos
        return out

    @torch.no_grad()
    def _run(self, x: torch.Tensor, pos: np.ndarray, cache: Cache,
             queries: list[torch.Tensor] | None = None, own: torch.Tensor | None = None) -> torch.Tensor:
        m, n, past = self.model, len(x), len(cache.positions)
        cache.positions = np.concatenate([cache.positions, pos]) if past else pos
        own = torch.ones(n, n, dtype=torch.bool).tril() if own is None else own
        mask = torch.cat([torch.ones(n, past, dtype=torch.bool), own], 1)
        for i in range(m.block_count):
            h = self._norm(x, f"blk.{i}.attn_norm.weight")
            q, k, v = (self._linear(h, f"blk.{i}.attn_{c}").view(n, -1, m.key_length[i]) for c in "qkv")
            cache.keys[i], cache.values[i] = (torch.cat([old, new]) if past else new for old, new in ((cache.keys[i], k), (cache.values[i], v)))
            q = self._turn(q, pos, i)
            if queries is not None:
                queries.append(q)
            turned, values = self._turn(cache.keys[i], cache.positions, i), cache.values[i]
            if self.cells:
                turned, values = self.cells(turned, values, cache.picture)
            parts = (y.transpose(0, 1)[None] for y in (q, turned, values))
            o = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
            x = x + self._linear(o[0].transpose(0, 1).reshape(n, -1), f"blk.{i}.attn_output")
            h = self._norm(x, f"blk.{i}.ffn_norm.weight")
            x = x + self._linear(F.silu(self._linear(h, f"blk.{i}.ffn_gate")) * self._linear(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
        return self._norm(x, "output_norm.weight")
