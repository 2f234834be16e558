"""Damaged capsules: one list for both readers. Each entry maps a good capsule to a bad one, and has a pattern for the line that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_gguf import rewrite

N = 16
U8, U16, U32, F32, STR = (gguf.GGUFValueType[x] for x in ("UINT8", "UINT16", "UINT32", "FLOAT32", "STRING"))

Damage = Callable[[Path, Path], Any]  # reads a good capsule, writes a bad one


def fields(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def raw(change: Callable[[bytes], bytes]) -> Damage:
    return lambda good, bad: bad.write_bytes(change(good.read_bytes()))


def key(name: str, value: Any, kind: gguf.GGUFValueType = U32) -> Damage:
    """Sets a key; a function maps its old value."""

    def damage(good: Path, bad: Path) -> None:
        rewrite(good, bad, kv={name: (value(fields(good)[name]) if callable(value) else value, kind)})

    return damage


def without(*names: str) -> Damage:
    return lambda good, bad: rewrite(good, bad, kv={n: None for n in names if not n.startswith("blk.")},
                                     tensors={n: None for n in names if n.startswith("blk.")})


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return lambda good, bad: rewrite(good, bad, tensors={name: change})


def put(value: float, *at: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data[at] = value
        return data

    return change


def at(i: int, value: Any) -> Callable[[list], list]:
    return lambda old: [*old[:i], value, *old[i + 1:]]


def length_of(data: bytes, name: bytes, value: int) -> bytes:
    """Sets the length of a string value, or of an array."""
    i = data.index(name) + len(name) + 4
    i += 4 if name == b"kvcapsule.layers" else 0
    return data[:i] + value.to_bytes(8, "little") + data[i + 8 :]


def offset_of(data: bytes, name: bytes, value: int) -> bytes:
    """Sets the offset of a 2-dimensional tensor."""
    i = data.index(name) + len(name) + 4 + 16 + 4
    return data[:i] + value.to_bytes(8, "little") + data[i + 8 :]


def tensor_field(data: bytes, name: bytes, at: int, value: int, size: int) -> bytes:
    """Sets a number behind the name of a tensor: dimensions (u32), ne (u64 each), type (u32), offset (u64)."""
    i = data.index(name) + len(name) + at
    return data[:i] + value.to_bytes(size, "little") + data[i + size :]


def kind_of(data: bytes, name: bytes, value: int) -> bytes:
    """Sets the type of the elements of an array."""
    return tensor_field(data, name, 4, value, 4)


def _dirty_padding(good: Path, bad: Path) -> None:
    data = bytearray(good.read_bytes())
    start = gguf.GGUFReader(good).data_offset
    assert data[start - 1] == 0, "the header of this file has no padding"
    data[start - 1] = 1
    bad.write_bytes(data)


def _three_tiers(good: Path, bad: Path) -> None:
    """A second economy tier with more rows than the first."""
    f = fields(good)
    half = [v // 2 for v in f["kvcapsule.tier.key_rows"][10:]]
    half_v = [v // 2 for v in f["kvcapsule.tier.value_rows"][10:]]
    ratio = f["kvcapsule.tier.ratio"]
    rewrite(good, bad, kv={
        "kvcapsule.tier.name": (["faithful", "less", "more"], STR), "kvcapsule.tier.ratio": ([ratio[0], (1 + ratio[1]) / 2, ratio[1]], F32),
        "kvcapsule.tier.key_codec": ([0] * 6, U32), "kvcapsule.tier.kappa": ([0.0] * 6, F32),
        "kvcapsule.tier.key_rows": (f["kvcapsule.tier.key_rows"][:10] + half + f["kvcapsule.tier.key_rows"][10:], U32),
        "kvcapsule.tier.value_rows": (f["kvcapsule.tier.value_rows"][:10] + half_v + f["kvcapsule.tier.value_rows"][10:], U32)})  # fmt: skip


def _tensors_reversed(good: Path, bad: Path) -> None:
    names = [t.name for t in gguf.GGUFReader(good).tensors]
    data = {t.name: np.array(t.data) for t in gguf.GGUFReader(good).tensors}
    rewrite(good, bad, tensors=dict.fromkeys(names), add=[(n, data[n]) for n in reversed(names)])


K = "blk.1.kvcapsule."
DAMAGES: dict[str, tuple[Damage, str]] = {
    # the file itself
    "empty": (raw(lambda b: b""), "GGUF|incomplete"),
    "no GGUF": (raw(lambda b: b"Not a model at all.\n" * 50), "GGUF"),
    "magic": (raw(lambda b: b"GGML" + b[4:]), "GGUF"),
    "future GGUF": (raw(lambda b: b[:4] + (99).to_bytes(4, "little") + b[8:]), "GGUF"),
    "cut in the header": (raw(lambda b: b[:20]), "GGUF|incomplete"),
    "cut in the keys": (raw(lambda b: b[:400]), "GGUF|incomplete"),
    "cut in the tensors": (raw(lambda b: b[:-5000]), "bounds|incomplete"),
    "last byte lost": (raw(lambda b: b[:-1]), "bounds|incomplete"),
    "a billion keys": (raw(lambda b: b[:16] + (1 << 30).to_bytes(8, "little") + b[24:]), "1073741824 keys"),
    "a billion tensors": (raw(lambda b: b[:8] + (1 << 30).to_bytes(8, "little") + b[16:]), "1073741824 tensors"),
    "noise in the keys": (raw(lambda b: b[:100] + bytes(np.random.default_rng(0).integers(0, 256, 300, np.uint8)) + b[400:]), "capsule"),
    # not a capsule of this version
    "another adapter": (key("adapter.type", "lora", STR), "capsule"),
    "a newer format": (key("kvcapsule.version", 3), "version 3"),
    "format 2": (key("kvcapsule.version", 2), "layer_rope|smaller"),
    "no version": (without("kvcapsule.version"), "version"),
    "version is a string": (key("kvcapsule.version", "1", STR), "version"),
    # another model
    "another fingerprint": (key("kvcapsule.base.fingerprint", "0" * 64, STR), "fingerprint"),
    "no fingerprint": (without("kvcapsule.base.fingerprint"), "fingerprint"),
    "another number of heads": (key("kvcapsule.base.head_count_kv", [4, 4]), "head"),
    "another head size": (key("kvcapsule.base.key_length", [128, 128]), "head size|key_length"),
    "another number of layers": (key("kvcapsule.base.block_count", 3), "layers|block_count"),
    "another RoPE": (key("kvcapsule.base.rope.type", "neox", STR), "RoPE|rope"),
    "another architecture": (lambda good, bad: rewrite(good, bad, kv={
        "kvcapsule.base.architecture": ("qwen2", STR), "general.architecture": ("qwen2", STR)}), "architecture"),
    # numbers out of range
    "no block": (key("kvcapsule.block_size", 0), "block_size"),
    "a huge block": (key("kvcapsule.block_size", 1 << 31), "block_size"),
    "another block": (key("kvcapsule.block_size", 2 * N), "basis|token_order|shape"),
    "image of odd size": (key("kvcapsule.image_tokens", N + 1), "image_tokens"),
    "unknown shape": (key("kvcapsule.block_shape", "cube", STR), "shape"),
    "a layer too many": (key("kvcapsule.layers", [1, 2]), "layer"),
    "a layer twice": (key("kvcapsule.layers", [1, 1]), "layer"),
    "no rows": (key("kvcapsule.tier.key_rows", lambda v: [0] * 5 + v[5:]), "rows"),
    "more rows than tokens": (key("kvcapsule.tier.value_rows", at(0, N + 1)), "rows"),
    "rows that overflow": (key("kvcapsule.tier.value_rows", lambda v: [0xFFFFFFFF, 2, *v[2:]]), "rows"),
    "too few row counts": (key("kvcapsule.tier.key_rows", lambda v: v[:-1]), "key_rows"),
    "unknown codec": (key("kvcapsule.tier.key_codec", at(0, 7)), "codec"),
    "retain without its data": (key("kvcapsule.tier.key_codec", at(0, 1)), "retain|kept"),
    "kept without gates": (key("kvcapsule.kept_count", [N // 2, N // 2]), "gate|neighbour"),
    "all tokens kept": (key("kvcapsule.kept_count", [N, N]), "kept"),
    "an MLP without weights": (key("kvcapsule.mlp_width", [8, 8]), "mlp|MLP"),
    "too many neighbours": (key("kvcapsule.neighbour_count", 1000), "neighbour"),
    "token order": (key("kvcapsule.token_order", lambda v: [v[0], *v[:1], *v[2:]], gguf.GGUFValueType.UINT16), "token_order|permutation"),
    "NaN kappa": (key("kvcapsule.tier.kappa", at(1, float("nan")), F32), "kappa|finite"),
    "NaN ratio": (key("kvcapsule.default_ratio", float("nan"), F32), "ratio|finite"),
    "no faithful tier": (key("kvcapsule.tier.name", lambda v: ["a", *v[1:]], STR), "faithful"),
    # tensors
    "NaN in a basis": (tensor(K + "k_basis", put(np.nan, 3, 4)), "k_basis"),
    "infinite mean": (tensor(K + "v_mean", put(np.inf, 0, 1)), "v_mean"),
    "infinite weight": (tensor(K + "k_query_weight", put(-np.inf, 0, 0)), "k_query_weight"),
    "a flat basis": (tensor(K + "v_basis", lambda a: a.reshape(-1)), "v_basis"),
    "half a basis": (tensor(K + "v_basis", lambda a: np.ascontiguousarray(a[: N // 2])), "v_basis"),
    "basis in f16": (tensor(K + "v_basis", lambda a: a.astype(np.float16)), "v_basis"),
    **{f"no {t}": (without(K + t), t) for t in ("k_mean", "v_mean", "k_basis", "v_basis", "k_query_weight")},
    "a tensor too many": (lambda good, bad: rewrite(good, bad, add=[("blk.0.kvcapsule.extra", np.ones(4, np.float32))]), "extra"),
    "a foreign tensor": (lambda good, bad: rewrite(good, bad, add=[("blk.0.attn_q.weight", np.ones(4, np.float32))]), "attn_q"),

    "fingerprint is not hex": (key("kvcapsule.base.fingerprint", "x" * 64, STR), "fingerprint"),
    "RoPE kind": (key("kvcapsule.base.rope.type", "spiral", STR), "rope.type"),
    "NaN frequency": (key("kvcapsule.base.rope.freq_base", [float("nan"), 1e4], F32), "freq_base"),
    "ratio does not fit the rows": (key("kvcapsule.tier.ratio", [-1.0, 0.9], F32), "tier.ratio"),
    "a type that does not fit": (lambda g, b: rewrite(g, b, kv={
        "kvcapsule.base.key_length": ([96, 96], U32), "kvcapsule.tier.key_rows": ([0, 0, 0, 0, 16] * 4, U32)},
        tensors={f"blk.{i}.kvcapsule.{t}": lambda a: np.ones((2, 96), np.float32) for i in (0, 1) for t in ("k_mean", "k_query_weight")}), "q2_0"),
    "unknown key": (lambda g, b: rewrite(g, b, kv={"kvcapsule.extra": (1, U32)}), "unknown key kvcapsule.extra"),
    "u64 for u32": (key("kvcapsule.block_size", 16, gguf.GGUFValueType.UINT64), "block_size is u64, not u32"),
    "array for a number": (key("kvcapsule.block_size", [16]), "block_size"),
    "number for an array": (key("kvcapsule.mlp_width", 0), "mlp_width is u32, not an array"),
    "one tier": (lambda g, b: rewrite(g, b, kv={"kvcapsule.tier.name": (["faithful"], STR)}), "tier"),
    "negative weight": (tensor(K + "k_query_weight", put(-1, 0, 0)), "k_query_weight"),
    "bytes behind the end": (raw(lambda b: b + bytes(10_000)), "belong to nothing"),
    "many keys": (lambda g, b: rewrite(g, b, kv={f"kvcapsule.train.{i}": (i, U32) for i in range(300)}), "more than 256"),
    "a long string": (key("kvcapsule.block_shape", "a" * 70_000, STR), "string"),
    "a long array": (key("kvcapsule.layers", list(range(70_000))), "array"),
    "a false array length": (raw(lambda b: length_of(b, b"kvcapsule.layers", 1 << 60)), "incomplete|array"),
    "a false string length": (raw(lambda b: length_of(b, b"kvcapsule.block_shape", 1 << 60)), "incomplete"),
    "another key twice": (raw(lambda b: b.replace(b"kvcapsule.base.key_length", b"kvcapsule.tier.key_rows.\0")), "printable"),
    "a tensor twice": (raw(lambda b: b.replace(b"blk.1.kvcapsule.v_mean", b"blk.1.kvcapsule.k_mean")), "k_mean is there twice"),
    "overlap": (raw(lambda b: offset_of(b, b"blk.1.kvcapsule.v_mean", 0)), "is at offset 0, not"),
    "a control character": (key("kvcapsule.block_shape", "\x1b[2Jraster\n", STR), "block_shape is not printable"),
    # only what the format has, and all of it
    "a foreign key": (key("tokenizer.chat_template", "{{ 7 * 7 }}", STR), "unknown key tokenizer.chat_template"),
    "a key hidden by a zero byte": (raw(lambda b: b.replace(b"kvcapsule.block_width", b"kvcapsule.block\0width")), "printable"),
    "a value with a zero byte": (key("kvcapsule.base.rope.type", "norm\0x", STR), "rope.type is not printable"),
    "ratios descend": (_three_tiers, "does not ascend"),
    "a gap between tensors": (raw(lambda b: offset_of(b, b"blk.1.kvcapsule.v_mean", 4128)), "is at offset 4128"),
    "bytes in the padding": (_dirty_padding, "padding"),
    "a long key": (lambda g, b: rewrite(g, b, kv={"kvcapsule.train." + "x" * 300: (1, U32)}), "name of a key has 316 bytes"),
    "alignment of 48": (key("general.alignment", 48), "general.alignment"),
    "alignment is a string": (key("general.alignment", "32", STR), "general.alignment"),
    "architectures differ": (key("general.architecture", "qwen2", STR), "general.architecture is not"),
    "type is not adapter": (key("general.type", "model", STR), "general.type is not"),
    "an adapter.type that is a number": (key("adapter.type", 1), "adapter.type is not"),
    "no block width": (without("kvcapsule.block_width"), "block_width is missing"),
    "a tile that does not fit": (lambda g, b: rewrite(g, b, kv={"kvcapsule.block_shape": ("tile", STR), "kvcapsule.block_width": (5, U32)}), "block_width 5"),
    **{
        f"a tile {name}": (lambda g, b, kv=kv: rewrite(g, b, kv={f"kvcapsule.{k}": (v, STR if k == "block_shape" else U32) for k, v in kv.items()}), line)
        for name, kv, line in [
            ("of no width", {"block_shape": "tile", "block_width": 0}, "block_width 0 does not divide"),
            ("wider than a block", {"block_shape": "tile", "block_width": 2 * N, "image_tokens": N * N}, "block_width 32 does not divide"),
            ("of a huge width", {"block_shape": "tile", "block_width": 0xFFFFFFFF, "image_tokens": N * N}, "block_width 4294967295 does not divide"),
            ("without a grid", {"block_shape": "tile", "block_width": 4}, "norm nor image_tokens 0 gives a grid"),
            ("of images that are no squares", {"block_shape": "tile", "block_width": 4, "image_tokens": 2 * N}, "norm nor image_tokens 32 gives a grid"),
            ("of huge images", {"block_shape": "tile", "block_width": 4, "image_tokens": 0xFFFFFFF0}, "norm nor image_tokens 4294967280 gives a grid"),
        ]
    },
    "default ratio out of range": (key("kvcapsule.default_ratio", 1.5, F32), "default_ratio"),
    "negative frequency": (key("kvcapsule.base.rope.freq_base", [1e4, -1.0], F32), "freq_base"),
    "a thousand heads too many": (key("kvcapsule.base.head_count_kv", [5000, 2]), "head_count_kv of layer 0 is 5000"),
    "an array of arrays": (raw(lambda b: kind_of(b, b"kvcapsule.layers", 9)), "array of arrays"),
    "an unknown value type": (raw(lambda b: kind_of(b, b"kvcapsule.layers", 77)), "unknown type 77"),
    "an unknown tensor type": (raw(lambda b: tensor_field(b, b"blk.1.kvcapsule.v_mean", 20, 250, 4)), "unknown type 250"),
    "no dimensions": (raw(lambda b: tensor_field(b, b"blk.1.kvcapsule.v_mean", 0, 0, 4)), "0 dimensions"),
    "a zero dimension": (raw(lambda b: tensor_field(b, b"blk.1.kvcapsule.v_mean", 4, 0, 8)), "impossible shape"),
    "dimensions that wrap": (raw(lambda b: tensor_field(b, b"blk.1.kvcapsule.v_mean", 4, (1 << 63) + 64, 8)), "impossible shape"),
    "values beyond f16": (tensor(K + "k_mean", put(1e30, 0, 0)), "k_mean has values"),
    "a mean of values that f16 just holds": (tensor(K + "v_mean", put(65504, 0, 0)), "v_mean has values beyond"),
    "a head of 513": (key("kvcapsule.base.key_length", [513, 64]), "key_length of layer 0 is 513"),
    "a basis of longer rows": (tensor(K + "k_basis", lambda a: 1.1 * a), "k_basis has a row 0"),
}  # fmt: skip
RETAIN_DAMAGES = {
    "neighbour outside": (tensor(K + "k_neighbours", lambda a: np.where(a == a.max(), 8, a).astype(np.int32)), "k_neighbours"),
    "neighbour negative": (tensor(K + "k_neighbours", lambda a: a - 8), "k_neighbours"),
    "NaN gate": (tensor(K + "k_gate", put(np.nan, 0, 0, 0, 0)), "k_gate"),
    "gate in f32": (tensor(K + "k_gate", lambda a: a.astype(np.float32)), "k_gate has type f32, not f16"),
    "infinite MLP": (tensor(K + "k_mlp_down", put(np.inf, 0, 0, 0)), "k_mlp_down"),
    **{f"no {t}": (without(K + t), t) for t in ("k_gate", "k_neighbours", "k_mlp_up", "k_mlp_up_bias", "k_mlp_down")},
    "fewer rows than kept": (key("kvcapsule.tier.key_rows", lambda v: [7, 0, 0, 0, 0] * 4), "fewer rows"),
    "no neighbours": (key("kvcapsule.neighbour_count", 0), "neighbour"),
    "MLP without kept": (lambda g, b: rewrite(g, b, kv={"kvcapsule.kept_count": ([0, 0], U32), "kvcapsule.tier.key_codec": ([0] * 4, U32)},
                                              tensors={f"blk.{i}.kvcapsule.{t}": None for i in (0, 1) for t in ("k_gate", "k_neighbours")}), "mlp_width"),
    "token out of range": (key("kvcapsule.token_order", at(3, 16), U16), "permutation"),
}  # fmt: skip

# strange, but nothing is wrong with it: both readers take it
ACCEPTED: dict[str, Damage] = {
    "GGUF version 2": raw(lambda b: b[:4] + (2).to_bytes(4, "little") + b[8:]),
    "a bool of 2": raw(lambda b: tensor_field(b, b"kvcapsule.layer_rope", 16, 2, 1)),
    "a name that is not UTF-8": raw(lambda b: b.replace(b"random capsule", b"random \xff\x00psule")),
    "provenance of any type": lambda good, bad: rewrite(good, bad, kv={"kvcapsule.train.losses": ([1.0, float("nan")], F32), "general.tags": (["a", "b"], STR)}),
    "other tensors first": lambda good, bad: _tensors_reversed(good, bad),
    "a tile": lambda good, bad: rewrite(
        good, bad, kv={"kvcapsule.block_shape": ("tile", STR), "kvcapsule.block_width": (2, U32), "kvcapsule.image_tokens": (4 * N, U32)}
    ),
}  # fmt: skip

# what only shows against the base model, and is not damage of the file
NEEDS_THE_MODEL = {"another fingerprint", "another number of heads", "another head size", "another number of layers", "another RoPE", "another architecture"}
