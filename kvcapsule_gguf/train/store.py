"""What is kept of the pictures: second moments of all of them, and a bounded number of their blocks, on disk.

Blocks are f16, a file per layer and kind, so that fitting one layer needs the memory of one layer. After every picture the folder holds all that is
needed to go on from there, also after `kill -9`: state.npz is replaced as a whole, and what a file has behind its blocks is cut off.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from ..codec.cut import BlockShape
from ..codec.rope import tie_pairs
from ..format.base_model import BaseModel
from .source import KVSample, TrainError

HELD_BACK = 4  # every fourth image calibrates the guard and is not fitted to
MEMORY = 512 << 20  # bytes: f32 blocks of the largest layer and kind that are kept, however many pictures there are
STATE = "state.npz"


class BlockStore:
    """Blocks of N tokens of every KV layer, and the second moment of the queries. Close it, or use it as a context manager."""

    def __init__(self, model: BaseModel, block: BlockShape, folder: Path, *, expected: int = 1, seed: int = 0, memory: int = MEMORY) -> None:
        """expected: pictures that will come; folder: made if it is not there, gone on with if it has a state, which is one of the same settings."""
        self.model, self.block, self.block_size, self.folder = model, block, block.size, folder
        self.expected, self.seed, self.memory = expected, seed, memory
        self.images = 0  # that are in the store
        self.next = 0  # number of the picture to go on with
        self.image_tokens: set[int] = set()
        self.widths: set[int] = set()
        self.held: list[bool] = []  # of every block
        layers = model.kv_layers
        self._q2 = [np.zeros((model.head_count_kv[i], model.key_length[i])) for i in layers]
        self._n_queries = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self._files = {(i, kind): (folder / f"{kind}{i}").open("r+b" if self.held else "wb") for i in range(len(layers)) for kind in "kv"}
            for key, f in self._files.items():
                f.truncate(len(self.held) * self._block_bytes(*key))
                f.seek(0, os.SEEK_END)
        except OSError as error:
            raise full(folder, error) from None

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *exception: object) -> None:
        for f in self._files.values():
            try:
                f.close()
            except OSError:  # what is buffered does not fit on the disk: the state does not count it
                pass

    def _shape(self, i: int, kind: str) -> tuple[int, int, int]:
        layer = self.model.kv_layers[i]
        return self.model.head_count_kv[layer], self.block_size, (self.model.key_length if kind == "k" else self.model.value_length)[layer]

    def _block_bytes(self, i: int, kind: str) -> int:
        return 2 * int(np.prod(self._shape(i, kind)))

    @property
    def disk_bytes_block(self) -> int:
        """Of one block, all layers."""
        return sum(self._block_bytes(i, kind) for i in range(len(self.model.kv_layers)) for kind in "kv")

    def chosen(self, n_blocks: int) -> np.ndarray:
        """Numbers of the blocks of the next picture that are kept: all of them, or a random share where all pictures' would take too much memory."""
        largest = 2 * max(self._block_bytes(i, kind) for i in range(len(self.model.kv_layers)) for kind in "kv")
        share = self.memory / largest / max(1, self.expected)  # blocks of a picture
        if share >= n_blocks:
            return np.arange(n_blocks)
        count = int((self.images + 1) * share) - int(self.images * share)
        return np.sort(np.random.default_rng([self.seed, self.images, 9]).permutation(n_blocks)[:count])

    def add(self, number: int, sample: KVSample) -> None:
        """Cuts picture `number` into blocks; a remainder is left out. Raises TrainError on NaN, infinities, and a full disk."""
        n_tokens = len(sample.keys[0])
        blocks = n_tokens // self.block_size
        tokens = self.block.order(n_tokens, sample.width)[: blocks * self.block_size]
        some = self.chosen(blocks)
        for i in range(len(self.model.kv_layers)):
            for kind, x in (("k", sample.keys[i]), ("v", sample.values[i])):
                if not np.isfinite(x).all():
                    raise TrainError(f"layer {self.model.kv_layers[i]} has {'keys' if kind == 'k' else 'values'} that are not finite")
                cut = x[tokens].reshape(blocks, self.block_size, *x.shape[1:]).swapaxes(1, 2)[some]
                try:
                    self._files[i, kind].write(np.clip(cut, -65504, 65504).astype(np.float16).tobytes())
                except OSError as error:
                    raise full(self.folder, error) from None
            self._add_queries(i, sample.queries[i])
        self._n_queries += len(sample.queries[0])
        self.held += [self.images % HELD_BACK == HELD_BACK - 1] * len(some)
        self.images += 1
        self.next = number + 1
        self.image_tokens.add(n_tokens)
        self.widths.add(sample.width)
        self._save()

    def _add_queries(self, i: int, q: np.ndarray) -> None:
        heads = self.model.head_count_kv[self.model.kv_layers[i]]
        grouped = q.reshape(len(q), heads, q.shape[1] // heads, q.shape[2]).astype(np.float64)
        self._q2[i] += np.square(grouped).mean(2).sum(0)

    def _save(self) -> None:
        part = self.folder / "state.part.npz"
        counts = np.array([self.images, self.next, self._n_queries])
        try:
            for f in self._files.values():
                f.flush()
            np.savez(
                part, counts=counts, held=np.array(self.held, bool), widths=np.array(sorted(self.widths)),
                image_tokens=np.array(sorted(self.image_tokens)), **{f"q{i}": q for i, q in enumerate(self._q2)},
            )  # fmt: skip
            os.replace(part, self.folder / STATE)
        except OSError as error:
            raise full(self.folder, error) from None

    def _resume(self) -> None:
        """A state that can not be read is none: the training starts again."""
        try:
            with np.load(self.folder / STATE, allow_pickle=False) as state:
                q2 = [state[f"q{i}"] for i in range(len(self._q2))]
                (images, last, n_queries), held, widths, tokens = (state[name].tolist() for name in ("counts", "held", "widths", "image_tokens"))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            return
        self.images, self.next, self._n_queries, self.held = images, last, n_queries, held
        self._q2, self.widths, self.image_tokens = q2, set(widths), set(tokens)

    def blocks(self, i: int, kind: str, held: bool) -> np.ndarray:
        """f32 [B, H, N, d]: all blocks of KV layer number i, kind "k" or "v", of the held-back images or of the others."""
        self._files[i, kind].flush()
        if not self.held:
            raise TrainError("no image has as many tokens as a block")
        data = np.memmap(self.folder / f"{kind}{i}", np.float16, "r", shape=(len(self.held), *self._shape(i, kind)))
        return data[np.array(self.held) == held].astype(np.float32)

    def query_weight(self, i: int, floor: float = 0.01) -> np.ndarray:
        """f32 [H, d_k]: second moment of the queries of the heads of each group, tied per frequency pair, mean 1; all ones without queries.

        `floor` keeps every channel at a hundredth of the mean: other questions than those seen may use it.
        """
        layer = self.model.kv_layers[i]
        rope = self.model.rope_type if self.model.layer_rope[layer] else "none"
        weight = tie_pairs(self._q2[i], rope, min(self.model.rope_dimensions, self.model.key_length[layer]))
        mean = weight.mean()
        if not self._n_queries or mean <= 0:
            return np.ones_like(weight, dtype=np.float32)
        weight = np.maximum(weight / mean, floor)
        return (weight / weight.mean()).astype(np.float32)


def full(path: Path, error: OSError) -> TrainError:
    return TrainError(f"{path} can not be written: {error.strerror or error}")
