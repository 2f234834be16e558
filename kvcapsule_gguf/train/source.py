"""Where keys, values and queries come from: a real model (collect.LlamaSource), or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..format.base_model import BaseModel
from ..format.capsule import Capsule
from ..runtime.errors import KVCapsuleError


class TrainError(KVCapsuleError):
    """Training can not go on; the text is one line for the user."""


@dataclass(frozen=True)
class KVSample:
    """One image of n tokens; a list has one array for each KV layer of the model (BaseModel.kv_layers)."""

    keys: list[np.ndarray]  # f32 [n, H, d_k], without RoPE
    values: list[np.ndarray]  # f32 [n, H, d_v]
    queries: list[np.ndarray]  # f32 [T, heads, d_k] of text that follows the image, with RoPE or without
    width: int = 0  # of the image in tokens, 0 unknown
    first_position: int = 0  # of its first token


@dataclass(frozen=True)
class Shape:
    """A picture that can be read, before the model looks at it."""

    number: int
    name: str
    tokens: int
    width: int = 0  # in tokens, 0 unknown


class KVSource(Protocol):
    """Gives the same samples, in the same order, every time: an interrupted training goes on in the middle."""

    model: BaseModel

    @property
    def identity(self) -> str:
        """Another one for other samples. Lines of two words: something that changes with the contents, and a name."""
        ...

    def shapes(self, say: Callable[[str], None]) -> list[Shape]:
        """Of the pictures in their order; those that can not be read are named and left out."""
        ...

    def read(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, KVSample]]:
        """(number of the picture, sample); of all that can be read. If some are named, of exactly these: raises KVCapsuleError for one that is gone."""
        ...

    def sensitivity(self, capsule: Capsule, folder: Path, say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
        """f64 [L] of the keys and of the values: what a unit of relative error costs in each layer. Raises TrainError."""
        ...


def _digest(sample: KVSample) -> str:
    digest = hashlib.sha256()
    for x in (*sample.keys, *sample.values):
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()


@dataclass
class ArraySource:
    """Samples that are there already."""

    model: BaseModel
    samples: Sequence[KVSample]

    @property
    def identity(self) -> str:
        return "\n".join(f"{_digest(sample)} sample-{i}" for i, sample in enumerate(self.samples))

    def shapes(self, say: Callable[[str], None]) -> list[Shape]:
        return [Shape(i, f"sample {i}", len(x.keys[0]), x.width) for i, x in enumerate(self.samples)]

    def read(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, KVSample]]:
        for i in range(len(self.samples)) if numbers is None else numbers:
            yield i, self.samples[i]

    def sensitivity(self, capsule: Capsule, folder: Path, say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
        raise TrainError("the sensitivity of the layers is measured on a running model; with arrays choose layers uniform or pyramid")
