"""Damaged capsules, for both readers: those of damages.py, and what belongs to the format."""

from __future__ import annotations

import gguf
import numpy as np
from damages import ACCEPTED, DAMAGES, F32, STR, U8, U32, Damage, at, key, offset_of, put, raw, tensor, tensor_field, without
from tiny_gguf import rewrite

I8 = gguf.GGUFValueType.INT8
K = "blk.1.kvcapsule."
NAN, INF = float("nan"), float("inf")


def smaller(i: int, value: float) -> Damage:
    return key("kvcapsule.smaller", at(i, value), F32)


TILE_DAMAGES: dict[str, tuple[Damage, str]] = {
    **DAMAGES,
    "a newer format": (key("kvcapsule.version", 3), "version 3, this program reads version 2"),
    "an older format": (key("kvcapsule.version", 1), "of format v1: train it anew with kvcapsule-train"),
    "a key of the older format": (lambda g, b: rewrite(g, b, kv={"kvcapsule.block_size": (64, U32)}), "unknown key kvcapsule.block_size"),
    **{f"no {name}": (without(f"kvcapsule.{name}"), f"{name} is missing") for name in ("layers", "layer_rope", "smaller", "key_energy", "base.rope.dimension_count")},
    # numbers
    "17 tiers": (key("kvcapsule.smaller", [float(20 - i) for i in range(17)], F32), "has 17 tiers"),
    "a tier too few": (key("kvcapsule.smaller", lambda v: v[:-1], F32), "k_table has shape"),
    "a size of 0": (smaller(-1, 0.0), "not a positive number"),
    "a negative size": (smaller(2, -1.0), "smaller of tier 2 is not a positive number"),
    "a size that is no number": (smaller(0, NAN), "smaller of tier 0 is not a positive number"),
    "an infinite size": (smaller(0, INF), "smaller of tier 0 is not a positive number"),
    "sizes that rise": (key("kvcapsule.smaller", lambda v: v[::-1], F32), "does not fall"),
    "sizes that are equal": (key("kvcapsule.smaller", lambda v: [v[0], v[0], v[2]], F32), "does not fall"),
    "a size that the tables do not have": (smaller(0, 99.0), "smaller of tier 0 is 99.000, its tables give"),
    "a size that is a little off": (key("kvcapsule.smaller", lambda v: [v[0] * 1.002, *v[1:]], F32), "its tables give"),
    "no energy": (key("kvcapsule.key_energy", at(1, 0.0), F32), "key_energy of layer 1"),
    "a negative energy": (key("kvcapsule.value_energy", at(0, -2.0), F32), "value_energy of layer 0"),
    "an energy that is no number": (key("kvcapsule.value_energy", at(0, NAN), F32), "value_energy of layer 0"),
    "an infinite energy": (key("kvcapsule.key_energy", at(0, INF), F32), "key_energy of layer 0"),
    "too few energies": (key("kvcapsule.key_energy", [1.0], F32), "key_energy has 1 elements, not 2"),
    "too many ropes": (key("kvcapsule.layer_rope", [True] * 3, gguf.GGUFValueType.BOOL), "layer_rope has 3 elements"),
    "three sections": (key("kvcapsule.base.rope.sections", [0, 0, 0]), "sections has 3 elements"),
    "RoPE on more channels than there are": (key("kvcapsule.base.rope.dimension_count", 66), "dimension_count 66 does not fit"),
    "RoPE on an odd channel": (key("kvcapsule.base.rope.dimension_count", 63), "dimension_count 63 does not fit"),
    "RoPE on fewer channels": (key("kvcapsule.base.rope.dimension_count", 30), "k_table has shape"),
    "no heads": (key("kvcapsule.base.head_count_kv", at(1, 0)), "head_count_kv of layer 1 is 0"),
    "heads of nothing": (key("kvcapsule.base.value_length", at(0, 0)), "value_length of layer 0 is 0"),
    "a length in bytes": (key("kvcapsule.base.key_length", [64, 64], U8), "key_length is an array of u8, not an array of u32"),
    "an array for the count of channels": (key("kvcapsule.base.rope.dimension_count", [64]), "dimension_count is an array of u32, not u32"),
    "a string for the sizes": (key("kvcapsule.smaller", "8", STR), "smaller is str, not an array of f32"),
    # tensors
    **{f"no {t}": (without(K + t), f"{t} is missing") for t in ("k_table", "v_table")},
    "bits of 5": (tensor(K + "k_table", put(5, 0, 0, 5, 0)), "k_table has a number of bits"),
    "bits of 7": (tensor(K + "k_table", put(7, 0, 0, 5, 0)), "k_table has a number of bits"),
    "bits of 12": (tensor(K + "v_table", put(12, 1, 1, 32, 1)), "v_table has a number of bits"),
    "negative bits": (tensor(K + "v_table", put(-1, 0, 0, 0, 0)), "v_table has a number of bits"),
    "bits that the size does not have": (tensor(K + "v_table", put(8, 0, slice(None))), "its tables give"),
    "a table of floats": (tensor(K + "k_table", lambda a: a.astype(np.float32)), "k_table has type f32, not i8"),
    "half a table": (tensor(K + "k_table", lambda a: np.ascontiguousarray(a[:, :, :16])), "k_table has shape"),
    "a flat table": (tensor(K + "k_table", lambda a: a.reshape(-1)), "k_table has shape"),
    "a mean of f16": (tensor(K + "v_mean", lambda a: a.astype(np.float16)), "v_mean has type f16"),
    "axes in f32": (tensor(K + "v_axes", lambda a: a.astype(np.float32)), "v_axes has type f32, not f16"),
    "axes that stretch": (tensor(K + "v_axes", put(3, 0, 0, 0)), "v_axes is not orthonormal"),
    "axes of zeros": (tensor(K + "v_axes", np.zeros_like), "v_axes is not orthonormal"),
    "axes that are the same": (tensor(K + "v_axes", lambda a: np.repeat(a[..., :1], a.shape[-1], -1)), "v_axes is not orthonormal"),
    "axes that are no numbers": (tensor(K + "v_axes", put(np.nan, 0, 3, 3)), "v_axes has values"),
    "axes of one head": (tensor(K + "v_axes", lambda a: a[:1].copy()), "v_axes has shape"),
    "a category of 2": (lambda g, b: rewrite(g, b, add=[(K + "narrow", np.array([0, 2], np.int8))]), "narrow has a value that is neither 0 nor 1"),
    "a negative category": (lambda g, b: rewrite(g, b, add=[(K + "narrow", np.array([-1, 0], np.int8))]), "narrow has a value that is neither 0 nor 1"),
    "a category too many": (lambda g, b: rewrite(g, b, add=[(K + "narrow", np.zeros(3, np.int8))]), "narrow has shape"),
    "categories of floats": (lambda g, b: rewrite(g, b, add=[(K + "narrow", np.zeros(2, np.float32))]), "narrow has type f32, not i8"),
    "axes of keys": (lambda g, b: rewrite(g, b, add=[(K + "k_axes", np.zeros((2, 64, 64), np.float16))]), "unexpected tensor blk.1.kvcapsule.k_axes"),
    "a gap between tensors": (raw(lambda b: offset_of(b, b"blk.1.kvcapsule.v_mean", 1 << 20)), "is at offset 1048576"),
    "a table twice": (raw(lambda b: b.replace(b"blk.1.kvcapsule.v_table", b"blk.1.kvcapsule.k_table")), "k_table is there twice"),
    "a table of a type that is gone": (raw(lambda b: tensor_field(b, b"blk.1.kvcapsule.k_table", 4 + 4 * 8, 4, 4)), "unknown type 4"),
}  # fmt: skip

# of a capsule with `retain`, values with a learned transform, and key MLPs
WHOLE_DAMAGES: dict[str, tuple[Damage, str]] = {
    **{f"no {t}": (without(K + t), f"{t} is missing") for t in ("k_order", "k_gate", "k_mlp_up", "k_mlp_down")},
    "no k_near": (without(K + "k_near"), "unexpected tensor blk.1.kvcapsule.k_order"),
    "no bias": (without(K + "k_mlp_bias"), "unexpected tensor blk.1.kvcapsule.k_mlp_up"),
    "a token twice": (tensor(K + "k_order", put(3, slice(0, 2))), "k_order is not an order of 64 tokens"),
    "token 64": (tensor(K + "k_order", put(64, 0)), "k_order is not an order of 64 tokens"),
    "token -1": (tensor(K + "k_order", put(-1, 0)), "k_order is not an order of 64 tokens"),
    "an order of 32": (tensor(K + "k_order", lambda a: a[:32].copy()), "k_order has shape"),
    "a neighbour that is dropped": (tensor(K + "k_near", lambda a: put(64 - len(a), 0, 0)(a)), "k_near points outside the .* kept tokens"),
    "a neighbour before the first": (tensor(K + "k_near", put(-1, 0, 0)), "k_near points outside the .* kept tokens"),
    "an even number dropped": (tensor(K + "k_near", lambda a: a[1:].copy()), "k_near is for .* dropped tokens, not for an odd number below 64"),
    "nothing kept": (tensor(K + "k_near", lambda a: np.zeros((65, 2), np.int8)), "k_near is for 65 dropped tokens"),
    "nine neighbours": (tensor(K + "k_near", lambda a: np.zeros((len(a), 9), np.int8)), "k_near has 9 neighbours, not 1..8"),
    "neighbours in f32": (tensor(K + "k_near", lambda a: a.astype(np.float32)), "k_near has type f32, not i8"),
    "a third dimension": (tensor(K + "k_near", lambda a: np.stack([a, a])), "k_near has shape"),
    "fewer gates": (tensor(K + "k_gate", lambda a: a[:, 2:].copy()), "k_gate has shape"),
    "gates in f32": (tensor(K + "k_gate", lambda a: a.astype(np.float32)), "k_gate has type f32, not f16"),
    "a gate that is no number": (tensor(K + "k_gate", put(np.nan, 0, 0, 0, 0)), "k_gate has values that are not finite"),
    "an infinite gate": (tensor(K + "k_gate", put(np.inf, 1, 2, 0, 3)), "k_gate has values that are not finite"),
    "an MLP of 1025": (tensor(K + "k_mlp_bias", lambda a: np.zeros((len(a), 1025), np.float32)), "k_mlp_bias has 1025 hidden units, not 1..1024"),
    "an MLP of one head": (tensor(K + "k_mlp_bias", lambda a: a[:1].copy()), "k_mlp_bias has shape"),
    "a bias beyond f16": (tensor(K + "k_mlp_bias", put(1e6, 0, 0)), "k_mlp_bias has values that are not finite or too large"),
    "an MLP that is no number": (tensor(K + "k_mlp_up", put(np.nan, 0, 0, 0)), "k_mlp_up has values that are not finite"),
    "an infinite MLP": (tensor(K + "k_mlp_down", put(-np.inf, 0, 0, 0)), "k_mlp_down has values that are not finite"),
    "a transform beside kept tokens": (lambda g, b: rewrite(g, b, add=[(K + "k_transform", np.eye(64, dtype=np.float16))]), "unexpected tensor blk.1.kvcapsule.k_transform"),
    "a transform that stretches": (tensor(K + "v_transform", put(2, 0, 0)), "v_transform is not orthonormal"),
    "a transform of zeros": (tensor(K + "v_transform", np.zeros_like), "v_transform is not orthonormal"),
    "a transform that is no number": (tensor(K + "v_transform", put(np.nan, 5, 5)), "v_transform has values that are not finite"),
    "a transform of 32 tokens": (tensor(K + "v_transform", lambda a: a[:32].copy()), "v_transform has shape"),
    "a transform in f32": (tensor(K + "v_transform", lambda a: a.astype(np.float32)), "v_transform has type f32, not f16"),
}  # fmt: skip

WHOLE_ACCEPTED: dict[str, Damage] = {"values by the DCT in one layer": without(K + "v_transform")}

TILE_ACCEPTED: dict[str, Damage] = {
    **ACCEPTED,
    "no axes in one layer": without(K + "v_axes"),
}

# what only shows against the base model, and is not damage of the file
NEEDS_THE_MODEL = {"another fingerprint", "another number of layers", "another architecture"}
