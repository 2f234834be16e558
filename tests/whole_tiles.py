"""Random transforms of whole tiles for tests: as the reference has them, and as the native code does (ggml_capsule_transform)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from make_capsule import random_transforms

from kvcapsule_gguf.codec.transform import Learned, Retain
from kvcapsule_gguf.format.tile_transform import whole_of

LANES = 16
POINTERS = ("matrix", "columns", "order", "near"), ("gates", "mlp_up", "mlp_bias", "mlp_down")


class Native(ctypes.Structure):
    """struct ggml_capsule_transform, all zero: the DCT. `arrays` keeps what it points to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS[0]), *((name, ctypes.c_int32) for name in ("n_kept", "n_near", "n_mlp")),
        *((name, ctypes.c_void_p) for name in POINTERS[1]),
    ]  # fmt: skip


class WholeTiles:
    """Of one kind in a layer."""

    def __init__(self, tensors: dict[str, np.ndarray], kind: str, groups: Sequence[np.ndarray]):
        self.tensors, self.kind, self.groups = tensors, kind, list(groups)
        self.native = Native()
        self.arrays = self._arrays()
        for name, array in self.arrays.items():
            setattr(self.native, name, array.ctypes.data)

    def head(self, head: int) -> Learned | Retain | None:
        return whole_of(self.tensors, self.kind, head, self.groups)

    def _arrays(self) -> dict[str, np.ndarray]:
        t, floats = self.tensors, lambda x: np.ascontiguousarray(x, np.float32)
        if self.kind == "k" and "k_near" in t:
            n = self.native
            n.n_kept, n.n_near = 64 - t["k_near"].shape[0], t["k_near"].shape[1]
            out = {"order": t["k_order"], "near": t["k_order"][t["k_near"]], "gates": floats(t["k_gate"])}
            if "k_mlp_bias" in t:
                heads, h, _ = t["k_mlp_up"].shape
                n.n_mlp = h
                out["mlp_up"] = floats(self._lanes(t["k_mlp_up"].reshape(heads, h, n.n_near, -1)))
                out["mlp_bias"], out["mlp_down"] = floats(t["k_mlp_bias"]), floats(self._lanes(t["k_mlp_down"].swapaxes(1, 2)))
            return out
        matrix = t.get(f"{self.kind}_transform")
        return {} if matrix is None else {"matrix": floats(matrix), "columns": floats(matrix.T)}

    def _lanes(self, x: np.ndarray) -> np.ndarray:
        """[..., d] -> [..., groups * 2 * 16]."""
        out = np.zeros((*x.shape[:-1], len(self.groups), 2, LANES), np.float32)
        for g, group in enumerate(self.groups):
            for register, channels in enumerate(group):
                for lane, c in enumerate(channels):
                    if c >= 0:
                        out[..., g, register, lane] = x[..., c]
        return out.reshape(*x.shape[:-1], -1)


def whole_tiles(codec: str, heads: int, groups_k: Sequence[np.ndarray], groups_v: Sequence[np.ndarray], mlp: int, rng: np.random.Generator) -> dict[str, WholeTiles]:
    """Of keys and of values."""
    d_k = 1 + max(int(g.max()) for g in groups_k)
    tensors = random_transforms(codec, heads, d_k, len(groups_k), mlp, rng)
    return {"k": WholeTiles(tensors, "k", groups_k), "v": WholeTiles(tensors, "v", groups_v)}
