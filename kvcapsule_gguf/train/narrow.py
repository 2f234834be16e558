"""Which KV heads need no other picture while a picture is read: measured on prompts with several pictures.

While pictures 2, 3, ... of a prompt are read with full attention, the library computes each head without the other pictures as well. What the attention of a layer
gives to the model loses by that is the head's error. A head is narrowed if a high quantile of its errors over pictures is below a threshold.
"""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .. import native
from ..chat.files import BUILT_IN
from ..eval.cache import Cache
from ..eval.pictures import Pictures, readable
from ..eval.prompts import Prompts
from ..eval.settings import Setting
from ..eval.vlm import Vlm
from ..format.base_model import BaseModel
from .source import TrainError

HOW = ("measured", "deeper-half", "none")
PER_PROMPT = 4  # pictures
QUANTILE = 0.9  # of the errors of a head
ERROR = 0.003  # that it may have


class Watch:
    """The callback of ggml's scheduler. errors: of each picture that is not the first, f64 [KV layers, KV heads]: the square of what the output of attention loses when
    a head is narrowed, over its own square; both behind the output matrix, if the file has one of that name."""

    def __init__(self, path: Path, model: BaseModel) -> None:
        self.model, self.errors = model, list[np.ndarray]()
        self.matrices = {int(m[1]): t for t in gguf.GGUFReader(path).tensors if (m := re.fullmatch(r"blk\.(\d+)\.attn_output\.weight", t.name))}
        self.base = native.load().ggml_base
        for name, result, arguments in (
            ("ggml_get_name", c.c_char_p, [c.c_void_p]), ("ggml_nbytes", c.c_size_t, [c.c_void_p]),
            ("ggml_backend_tensor_get", None, [c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t]),
        ):  # fmt: skip
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
        self.callback = native.load().llama.ggml_backend_sched_eval_callback(self._eval)
        self._narrow: tuple[int, np.ndarray] | None = None
        self._sums: dict[int, np.ndarray] = {}  # layer -> [KV heads + 1]: squares of what is lost, and of the whole

    def picture(self) -> None:
        """A picture was read."""
        layers = [i for i in self.model.kv_layers if i in self._sums]
        if layers:
            heads = max(self.model.head_count_kv)
            rows = [self._sums[i][:-1] / self._sums[i][-1] if i in self._sums else np.full(self.model.head_count_kv[i], np.inf) for i in self.model.kv_layers]
            self.errors.append(np.stack([np.pad(r, (0, heads - len(r)), constant_values=np.inf) for r in rows]))
        self._sums = {}

    def _eval(self, tensor: int, ask: bool, _: Any) -> bool:
        found = re.fullmatch(r"kqv_(narrow|out)-(\d+)", self.base.ggml_get_name(tensor).decode())
        if not found or ask:
            return found is not None
        layer = int(found[2])
        if found[1] == "narrow":
            self._narrow = layer, self._rows(tensor, layer)
        elif self._narrow and self._narrow[0] == layer:
            self._add(layer, self._narrow[1], self._rows(tensor, layer))
            self._narrow = None
        return True

    def _rows(self, tensor: int, layer: int) -> np.ndarray:
        data = np.empty(self.base.ggml_nbytes(tensor) // 4, np.float32)
        self.base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
        return data.reshape(-1, self.model.head_count[layer] * self.model.value_length[layer])

    def _add(self, layer: int, narrow: np.ndarray, full: np.ndarray) -> None:
        heads = self.model.head_count_kv[layer]
        lost = (narrow - full).reshape(len(full), heads, -1)
        if layer in self.matrices:
            w = gguf.quants.dequantize(self.matrices[layer].data, self.matrices[layer].tensor_type)
            parts, whole = [lost[:, h] @ p.T for h, p in enumerate(np.split(w, heads, 1))], full @ w.T
        else:
            parts, whole = list(lost.swapaxes(0, 1)), full
        sums = np.array([float(np.square(x, dtype=np.float64).sum()) for x in (*parts, whole)])
        self._sums[layer] = self._sums.get(layer, 0) + sums


def measure(vlm: Vlm, model: BaseModel, pictures: Pictures, n_ctx: int, say: Callable[[str], None]) -> np.ndarray:
    """f64 [pictures, KV layers, KV heads], errors of Watch; no pictures where the library narrows no head of this model. Raises KVCapsuleError."""
    watch = Watch(vlm.path, model)
    prompts = Prompts(vlm)
    setting = Setting("measure", capsule=Path(BUILT_IN), image_attention="measure")
    cache = Cache(vlm, setting, n_ctx, 1, watch=watch.callback)
    try:
        for group in _groups(pictures, say):
            read = vlm.read(prompts.before(), *group)
            try:
                cache.decode(read, each=watch.picture)
            finally:
                read.free()
    finally:
        cache.close()
    return np.array(watch.errors)


def _groups(pictures: Pictures, say: Callable[[str], None]) -> Iterator[list[Any]]:
    images = (picture.image for _, picture in readable(pictures, say=say))
    while len(group := list(islice(images, PER_PROMPT))) > 1:
        yield group


def narrowed(model: BaseModel, how: str, errors: np.ndarray, most: float) -> list[np.ndarray]:
    """u8 [KV heads] of each KV layer. how: one of HOW. What a token of a picture gets in the very last layer goes nowhere: no head of it needs anything. Raises TrainError."""
    heads = [model.head_count_kv[i] for i in model.kv_layers]
    if how == "deeper-half":  # MIMIC, arXiv 2601.07812
        return [np.full(n, 2 * i >= len(heads), np.uint8) for i, n in enumerate(heads)]
    if not len(errors):
        raise TrainError("no head was measured without other pictures")
    found = np.quantile(errors, QUANTILE, axis=0) <= most
    if model.kv_layers[-1] == model.block_count - 1:
        found[-1] = True
    return [row[:n].astype(np.uint8) for row, n in zip(found, heads)]


def described(heads: list[np.ndarray]) -> str:
    share = sum(int(x.sum()) for x in heads) / sum(len(x) for x in heads)
    whole = sum(bool(x.all()) for x in heads)
    return f"{share:.0%} of the KV heads need no other picture while a picture is read; in {whole} of {len(heads)} layers no head does"
