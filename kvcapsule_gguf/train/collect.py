"""Keys, values and text queries of a real model: it looks at pictures through libmtmd and is asked about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from .. import native
from ..eval.cache import Cache
from ..eval.pictures import Picture, Pictures, readable
from ..eval.prompts import Prompts
from ..eval.settings import Setting
from ..eval.vlm import EvalError, Vlm
from ..format.base_model import read_base_model
from ..format.capsule import Capsule
from .sensitivity import QUESTIONS, measure
from .source import KVSample, Shape, TrainError
from .tap import TensorTap


class LlamaSource:
    """A sample for every picture. Raises KVCapsuleError; close it, or use it as a context manager."""

    def __init__(
        self, model: Path, mmproj: Path, pictures: Pictures, *, n_ctx: int = 8192, threads: int = 0, device: str = "auto",
    ) -> None:
        self.model = read_base_model(model)
        self.pictures, self.n_ctx = pictures, n_ctx
        self.mmproj = mmproj
        self.vlm = Vlm(model, mmproj, threads or min(4, os.cpu_count() or 1), device=device)
        self.prompts = Prompts(self.vlm)

    def close(self) -> None:
        self.vlm.close()

    def __enter__(self) -> LlamaSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def identity(self) -> str:
        return f"{self.mmproj.stat().st_size} {self.mmproj.name}\n{self.pictures.identity}"

    def shapes(self, say: Callable[[str], None]) -> list[Shape]:
        found = []
        for i, picture in readable(self.pictures, say=say):
            try:
                found.append(Shape(i, picture.name, *self.vlm.shape(picture.image)))
            except EvalError as error:
                say(f"skipped: {picture.name}: {error}")
        return found

    def read(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, KVSample]]:
        tap = TensorTap(self.vlm.native, r"Qcur(_pos)?-\d+")
        cache = Cache(self.vlm, Setting("f16"), self.n_ctx, 1, flash_attn=False, watch=tap.callback)
        try:
            for i, picture in readable(self.pictures) if numbers is None else ((i, self.pictures[i]) for i in numbers):
                yield i, self._sample(cache, tap, picture)
        finally:
            cache.close()

    def sensitivity(self, capsule: Capsule, folder: Path, say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
        pictures = (picture for _, picture in readable(self.pictures))
        return measure(self.vlm, pictures, self.n_ctx, capsule, folder, say)

    def _sample(self, cache: Cache, tap: TensorTap, picture: Picture) -> KVSample:
        read = self.vlm.read(self.prompts.before(), picture.image)
        try:
            # an image in several slices: each slice is a span of its own; the largest stands for them
            p0, p1, part = max(cache.decode(read), key=lambda span: len(span[2].embd))
            n, width = len(part.embd), part.width
        finally:
            read.free()
        keys, values = [], []
        for layer in self.model.kv_layers:
            shape = (self.model.head_count_kv[layer], self.model.key_length[layer], self.model.value_length[layer])
            try:
                k, v = native.read_kv(cache.ctx, layer, shape, p0=p0, p1=p1, n_max=n)
            except native.CapsuleError as error:
                raise TrainError(str(error)) from None
            keys.append(k)
            values.append(v)
        return KVSample(keys, values, self._queries(cache, tap, picture.questions or QUESTIONS), width, p0)

    def _queries(self, cache: Cache, tap: TensorTap, questions: tuple[str, ...]) -> list[np.ndarray]:
        """Asks all questions after the picture, each from the same state."""
        found: list[list[np.ndarray]] = [[] for _ in self.model.kv_layers]
        for question in questions:
            tokens = self.prompts.question(question)
            tap.on = True
            cache.ask([(tokens, len(tokens) - 1)])  # logits everywhere: without, the last layer computes no queries
            tap.on = False
            seen = tap.take()
            for i, layer in enumerate(self.model.kv_layers):
                q = seen.get(f"Qcur_pos-{layer}", seen.get(f"Qcur-{layer}"))  # gemma4 has a name of its own for the last step
                if q is not None:
                    found[i].append(q.reshape(-1, self.model.head_count[layer], self.model.key_length[layer]))
        empty = [(self.model.head_count[x], self.model.key_length[x]) for x in self.model.kv_layers]
        return [np.concatenate(q) if q else np.zeros((0, *shape), np.float32) for q, shape in zip(found, empty)]
