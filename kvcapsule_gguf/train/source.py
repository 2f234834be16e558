"""Where keys, values and queries come from: a real model (collect.LlamaSource), or arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..format.base_model import BaseModel


class TrainError(RuntimeError):
    """Training can not go on; the text is one line for the user."""


@dataclass(frozen=True)
class KVSample:
    """One image of n tokens; a list has one array for each KV layer of the model (BaseModel.kv_layers)."""

    keys: list[np.ndarray]  # f32 [n, H, d_k], without RoPE
    values: list[np.ndarray]  # f32 [n, H, d_v]
    queries: list[np.ndarray]  # f32 [T, heads, d_k] of text that follows the image, with RoPE or without
    width: int = 0  # of the image in tokens, 0 unknown
    first_position: int = 0  # of its first token


class KVSource(Protocol):
    model: BaseModel

    def __iter__(self) -> Iterator[KVSample]: ...


@dataclass
class ArraySource:
    """Samples that are there already."""

    model: BaseModel
    samples: Iterable[KVSample]

    def __iter__(self) -> Iterator[KVSample]:
        return iter(self.samples)
