"""Keys and values of a real model: it looks at pictures through libmtmd."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .. import native
from ..codec.tiles import grid_width
from ..eval.cache import Cache
from ..eval.pictures import Picture, Pictures, readable
from ..eval.prompts import Prompts
from ..eval.settings import Setting
from ..eval.vlm import Vlm
from ..format.base_model import read_base_model
from ..runtime.timing import Progress
from .source import KVSample, TrainError


class LlamaSource:
    """A sample for every picture. Raises KVCapsuleError; close it, or use it as a context manager."""

    def __init__(self, model: Path, mmproj: Path, pictures: Pictures, *, n_ctx: int = 8192, threads: int = 0, device: str = "auto") -> None:
        self.model = read_base_model(model)
        self.pictures, self.n_ctx = pictures, n_ctx
        self.vlm = Vlm(model, mmproj, threads or min(4, os.cpu_count() or 1), device=device)
        self.prompts = Prompts(self.vlm)

    def close(self) -> None:
        self.vlm.close()

    def __enter__(self) -> LlamaSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, say: Callable[[str], None]) -> Iterator[KVSample]:
        """Pictures that can not be read are named and left out. Raises TrainError."""
        tell = Progress("pictures", say)
        cache = Cache(self.vlm, Setting("f16"), self.n_ctx, 1, flash_attn=False)
        try:
            for i, picture in readable(self.pictures, say=say):
                yield self._sample(cache, picture)
                tell(i + 1, len(self.pictures))
        finally:
            cache.close()

    def _sample(self, cache: Cache, picture: Picture) -> KVSample:
        read = self.vlm.read(self.prompts.before(), picture.image)
        try:
            # an image in several slices: each slice is a span of its own; the largest stands for them
            p0, p1, part = max(cache.decode(read), key=lambda span: len(span[2].embd))
            n, width = len(part.embd), part.width
        finally:
            read.free()
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for layer in self.model.kv_layers:
            shape = (self.model.head_count_kv[layer], self.model.key_length[layer], self.model.value_length[layer])
            try:
                k, v = native.read_kv(cache.ctx, layer, shape, p0=p0, p1=p1, n_max=n)
            except native.CapsuleError as error:
                raise TrainError(str(error)) from None
            if not np.isfinite(k).all() or not np.isfinite(v).all():
                raise TrainError(f"layer {layer} has keys or values that are not finite")
            keys.append(k)
            values.append(v)
        return KVSample(keys, values, width=width or grid_width(keys[len(keys) // 2]), first_position=p0)
