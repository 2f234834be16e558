"""K and V shapes of a loaded model, from its metadata."""

from __future__ import annotations

import ctypes as c
import json
from typing import NamedTuple

from .library import load


class LayerShape(NamedTuple):
    """n_head_kv = 0: the layer has no K and V."""

    n_head_kv: int
    d_k: int
    d_v: int


def metadata(model: int, key: str) -> str | None:
    """One metadata value of a model as text; arrays read like [1, 2]."""
    llama = load().llama
    size = llama.llama_model_meta_val_str(model, key.encode(), c.create_string_buffer(1), 1)
    if size < 0:
        return None
    buffer = c.create_string_buffer(size + 1)
    llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def layer_shapes(model: int) -> list[LayerShape]:
    """One entry per layer. Sliding-window layers with their own head size are told apart only when the metadata says so per layer."""
    arch = metadata(model, "general.architecture")
    layers = int(metadata(model, f"{arch}.block_count") or 0)

    def per_layer(key: str, default: list[int]) -> list[int]:
        text = metadata(model, f"{arch}.{key}")
        if text is None:
            return default
        value = json.loads(text)
        return list(value) if isinstance(value, list) else [value] * layers

    heads = per_layer("attention.head_count", [1] * layers)
    heads_kv = per_layer("attention.head_count_kv", heads)
    width = int(metadata(model, f"{arch}.embedding_length") or 0)
    default = [width // n if n else 0 for n in heads]
    d_k = per_layer("attention.key_length", default)
    d_v = per_layer("attention.value_length", default)
    return [LayerShape(*row) for row in zip(heads_kv, d_k, d_v)]
