"""K and V shapes of a loaded model."""

from __future__ import annotations

import ctypes as c
from typing import NamedTuple

from .library import load


class LayerShape(NamedTuple):
    """n_head_kv = 0: the layer has no K and V."""

    n_head_kv: int
    d_k: int
    d_v: int


def metadata(model: int, key: str) -> str | None:
    """One metadata value of a model as text; None if it has none, or an array."""
    llama = load().llama
    size = llama.llama_model_meta_val_str(model, key.encode(), c.create_string_buffer(1), 1)
    if size < 0:
        return None
    buffer = c.create_string_buffer(size + 1)
    llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def layer_shapes(model: int) -> list[LayerShape]:
    """One entry per layer; those with a sliding window count like the others."""
    native = load()
    if not native.has_capsule:
        return _from_metadata(model)
    shape = (c.c_int32 * 3)()
    found: list[LayerShape] = []
    while native.llama.llama_capsule_layer_shape(model, len(found), shape) == 0:
        found.append(LayerShape(*shape))
    return found


def _from_metadata(model: int) -> list[LayerShape]:
    """Of a library without capsules: right where all layers are alike. llama.cpp shows no arrays."""
    arch = metadata(model, "general.architecture")

    def number(key: str, default: int) -> int:
        text = metadata(model, f"{arch}.{key}")
        return default if text is None else int(text)

    heads = number("attention.head_count", 1)
    d = number("embedding_length", 0) // max(1, heads)
    shape = LayerShape(number("attention.head_count_kv", heads), number("attention.key_length", d), number("attention.value_length", d))
    return [shape] * number("block_count", 0)
