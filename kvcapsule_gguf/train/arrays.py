"""Fits a capsule to keys and values that were computed elsewhere, for instance in PyTorch (docs/reference/converters.md has an example)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..format.base_model import BaseModel, read_base_model
from ..format.capsule import Capsule
from .source import ArraySource, KVSample, TrainError
from .trainer import TrainOptions, to_stderr, train


def fit_capsule(
    model: str | Path, samples: Sequence[KVSample], options: TrainOptions | None = None, *, transformers_layout: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Capsule:
    """A capsule for the GGUF `model`, from one KVSample for every picture (at least 4; every fourth calibrates the guard).

    A sample has, for each layer with KV heads, keys f32 [tokens, KV heads, key length] *without RoPE*, values f32 [tokens, KV heads, value length],
    and queries f32 [text tokens, heads, key length] of text after the picture (any number, 0 = all channels count alike).
    transformers_layout: keys and queries have the channels in the order of Hugging Face transformers; llama.cpp's order differs where the two of a
    rotated pair are neighbours (architecture `llama`), and is put right here.
    Write the result with format.writer.write_capsule. Raises TrainError, CapsuleError.
    """
    base = read_base_model(model)
    options = options or TrainOptions()
    checked = []
    for i, sample in enumerate(samples):
        _check(base, i, sample)
        if transformers_layout and base.rope_type == "norm":
            keys, queries = ([interleave(x, min(base.rope_dimensions, x.shape[-1])) for x in part] for part in (sample.keys, sample.queries))
            sample = replace(sample, keys=keys, queries=queries)
        checked.append(sample)
    capsule = train(ArraySource(base, checked), options, say)
    capsule.provenance["images_from"] = "arrays"
    return capsule


def interleave(x: np.ndarray, n: int) -> np.ndarray:
    """Channels [..., d] of which i and i + n/2 are a rotated pair -> 2i and 2i + 1 are one."""
    out = np.array(x)
    out[..., 0:n:2], out[..., 1:n:2] = x[..., : n // 2], x[..., n // 2 : n]
    return out


def _check(base: BaseModel, number: int, sample: KVSample) -> None:
    layers = base.kv_layers
    for what, arrays, heads, length in (
        ("keys", sample.keys, base.head_count_kv, base.key_length), ("values", sample.values, base.head_count_kv, base.value_length),
        ("queries", sample.queries, base.head_count, base.key_length),
    ):  # fmt: skip
        if len(arrays) != len(layers):
            raise TrainError(f"sample {number} has {what} of {len(arrays)} layers, {base.name} has {len(layers)} with KV heads")
        for x, layer in zip(arrays, layers):
            wanted = (heads[layer], length[layer])
            if x.ndim != 3 or x.shape[1:] != wanted:
                raise TrainError(f"sample {number}, layer {layer}: {what} have the shape {list(x.shape)}, not [tokens, {wanted[0]}, {wanted[1]}]")
            if what != "queries" and len(x) != len(sample.keys[0]):
                raise TrainError(f"sample {number}, layer {layer}: {len(x)} {what}, not {len(sample.keys[0])} as the keys of the first layer")
