"""A model of architecture llama, qwen2 or qwen2vl in numpy, f64, without a cache of rows: every token sees what a rule of one line says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from image_rows import image_rows

from kvcapsule_gguf.codec.rope import angles, pair_index
from kvcapsule_gguf.format.base_model import read_base_model


@dataclass
class Cell:
    pos: tuple[int, int, int]  # t, y, x
    seqs: set[int]
    image: int  # a number of its own for every image, 0: text
    k: list[np.ndarray] = field(default_factory=list)  # of each layer, f64 [H, d], with RoPE
    v: list[np.ndarray] = field(default_factory=list)


class DenseModel:
    """narrow: of each layer and KV head, whether a vision token sees text and its own image only."""

    def __init__(self, path: Path, narrow: np.ndarray) -> None:
        self.model, self.narrow = read_base_model(path), narrow
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in gguf.GGUFReader(path).tensors}
        self.grid = self.model.rope_type in ("mrope", "imrope")
        self.cells: list[Cell] = []
        self.next: dict[int, int] = {}
        self.images = 0
        self.narrowed = 0  # rows of attention that would have seen another image

    def text(self, tokens: list[int], seq: int) -> np.ndarray:
        """Logits [n, vocab]."""
        start = self.next.get(seq, 0)
        self.next[seq] = start + len(tokens)
        return self._decode(self.w["token_embd.weight"][tokens], [(start + i,) * 3 for i in range(len(tokens))], seq, 0)

    def image(self, h: int, w: int, seed: int, seq: int) -> None:
        start, n = self.next.get(seq, 0), h * w
        self.next[seq] = start + (max(h, w) if self.grid else n)
        self.images += 1
        pos = [(start, start + i // w, start + i % w) if self.grid else (start + i,) * 3 for i in range(n)]
        self._decode(image_rows(seed, n, self.w["token_embd.weight"].shape[1]).astype(np.float32).astype(np.float64), pos, seq, self.images)

    def seq_rm(self, seq: int, p0: int, p1: int) -> None:
        for c in self.cells:
            if p0 <= c.pos[0] < p1:
                c.seqs.discard(seq)
        if p1 >= self.next.get(seq, 0):
            self.next[seq] = min(self.next.get(seq, 0), p0)

    def seq_cp(self, src: int, dst: int) -> None:
        for c in self.cells:
            if src in c.seqs:
                c.seqs.add(dst)
        self.next[dst] = self.next[src]

    def _sees(self, row: Cell, c: Cell, seq: int, narrow: bool) -> bool:
        """A token sees what is before it in its sequence, or at its position and not behind it in the picture."""
        before = c.pos[0] < row.pos[0] or (c.pos[0] == row.pos[0] and (not self.grid or c.pos[1:] <= row.pos[1:]))
        return seq in c.seqs and before and not (narrow and row.image and c.image not in (0, row.image))

    def _decode(self, x: np.ndarray, pos: list[tuple[int, int, int]], seq: int, image: int) -> np.ndarray:
        m, rows = self.model, [Cell(p, {seq}, image) for p in pos]
        self.cells = [c for c in self.cells if c.seqs] + rows
        masks = [np.where([[self._sees(r, c, seq, narrow) for c in self.cells] for r in rows], 0.0, -np.inf) for narrow in (False, True)]
        self.narrowed += int((masks[0] != masks[1]).any(1).sum())
        turn = angles(np.array([(*p, 0) for p in pos]), m.rope_type, m.rope_dimensions, m.freq_base[0], m.rope_sections, m.freq_factors)[:, None]
        first, second = pair_index(m.rope_type, m.rope_dimensions).T
        for i in range(m.block_count):
            h = self._norm(x, f"blk.{i}.attn_norm.weight")
            q, k, v = (self._linear(h, f"blk.{i}.attn_{c}").reshape(len(x), -1, m.key_length[i]) for c in "qkv")
            for y in (q, k):
                a, b = y[..., first].copy(), y[..., second].copy()
                y[..., first], y[..., second] = a * np.cos(turn) - b * np.sin(turn), a * np.sin(turn) + b * np.cos(turn)
            for n, c in enumerate(rows):
                c.k.append(k[n])
                c.v.append(v[n])
            keys, values = (np.stack([getattr(c, name)[i] for c in self.cells]) for name in "kv")
            group = q.shape[1] // keys.shape[1]
            out = np.empty_like(q)
            for n in range(q.shape[1]):
                s = q[:, n] @ keys[:, n // group].T / np.sqrt(q.shape[2]) + masks[int(self.narrow[i][n // group])]
                p = np.exp(s - s.max(1, keepdims=True))
                out[:, n] = p / p.sum(1, keepdims=True) @ values[:, n // group]
            x = x + self._linear(out.reshape(len(x), -1), f"blk.{i}.attn_output")
            h = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate = self._linear(h, f"blk.{i}.ffn_gate")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * self._linear(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
        return self._norm(x, "output_norm.weight") @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * self.w[name]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)
