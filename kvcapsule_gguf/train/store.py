"""Keeps the blocks of all images on disk in f16, a file per layer, so that fitting one layer needs the memory of one layer."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from ..codec.rope import tie_pairs
from ..format.base_model import BaseModel
from .source import KVSample, TrainError

HELD_BACK = 4  # every fourth image calibrates the guard and is not fitted to


class BlockStore:
    """Blocks of N tokens of every KV layer, and the second moment of the queries."""

    def __init__(self, model: BaseModel, block_size: int, folder: Path | None = None) -> None:
        self.model = model
        self.block_size = block_size
        self.folder = Path(tempfile.mkdtemp(prefix="kvcapsule-train-", dir=folder))
        self.images = 0
        self.image_tokens: set[int] = set()
        self.held: list[bool] = []  # of every block
        layers = model.kv_layers
        self._q2 = [np.zeros((model.head_count_kv[i], model.key_length[i])) for i in layers]
        self._n_queries = 0
        self._files = {(i, kind): (self.folder / f"{kind}{i}").open("wb") for i in range(len(layers)) for kind in "kv"}

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *exception: object) -> None:
        for f in self._files.values():
            f.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, sample: KVSample) -> int:
        """Cuts an image into blocks (a remainder is left out) and returns how many. Raises TrainError on NaN and infinities."""
        n_tokens = len(sample.keys[0])
        blocks = n_tokens // self.block_size
        held = self.images % HELD_BACK == HELD_BACK - 1
        for i in range(len(self.model.kv_layers)):
            for kind, x in (("k", sample.keys[i]), ("v", sample.values[i])):
                if not np.isfinite(x).all():
                    raise TrainError(f"layer {self.model.kv_layers[i]} has {'keys' if kind == 'k' else 'values'} that are not finite")
                cut = x[: blocks * self.block_size].reshape(blocks, self.block_size, *x.shape[1:]).swapaxes(1, 2)
                self._files[i, kind].write(np.clip(cut, -65504, 65504).astype(np.float16).tobytes())
            self._add_queries(i, sample.queries[i])
        self._n_queries += len(sample.queries[0])
        self.images += 1
        self.image_tokens.add(n_tokens)
        self.held += [held] * blocks
        return blocks

    def _add_queries(self, i: int, q: np.ndarray) -> None:
        heads = self.model.head_count_kv[self.model.kv_layers[i]]
        grouped = q.reshape(len(q), heads, q.shape[1] // heads, q.shape[2]).astype(np.float64)
        self._q2[i] += np.square(grouped).mean(2).sum(0)

    def blocks(self, i: int, kind: str, held: bool) -> np.ndarray:
        """f32 [B, H, N, d]: all blocks of KV layer number i, kind "k" or "v", of the held-back images or of the others."""
        self._files[i, kind].flush()
        layer = self.model.kv_layers[i]
        d = self.model.key_length[layer] if kind == "k" else self.model.value_length[layer]
        shape = (len(self.held), self.model.head_count_kv[layer], self.block_size, d)
        if not len(self.held):
            raise TrainError("no image has as many tokens as a block")
        data = np.memmap(self.folder / f"{kind}{i}", np.float16, "r", shape=shape)
        return data[np.array(self.held) == held].astype(np.float32)

    def query_weight(self, i: int, floor: float = 0.01) -> np.ndarray:
        """f32 [H, d_k]: second moment of the queries of the heads of each group, tied per frequency pair, mean 1; all ones without queries.

        `floor` keeps every channel at a hundredth of the mean: other questions than those seen may use it.
        """
        layer = self.model.kv_layers[i]
        rope = self.model.rope_type or "none"
        weight = tie_pairs(self._q2[i], rope, min(self.model.rope_dimensions, self.model.key_length[layer]))
        mean = weight.mean()
        if not self._n_queries or mean <= 0:
            return np.ones_like(weight, dtype=np.float32)
        weight = np.maximum(weight / mean, floor)
        return (weight / weight.mean()).astype(np.float32)
