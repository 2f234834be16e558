"""What training learns from: the keys and values of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..runtime.errors import KVCapsuleError


class TrainError(KVCapsuleError):
    """Training can not go on; the text is one line for the user."""


@dataclass(frozen=True)
class KVSample:
    """One image of n tokens; a list has one array for each KV layer of the model (BaseModel.kv_layers)."""

    keys: list[np.ndarray]  # f32 [n, H, d_k], without RoPE
    values: list[np.ndarray]  # f32 [n, H, d_v]
    queries: list[np.ndarray] = field(default_factory=list)  # f32 [T, heads, d_k] of text that follows the image, with RoPE or without; the study measures with them
    width: int = 0  # of the image in tokens, 0 unknown
    first_position: int = 0  # of its first token
