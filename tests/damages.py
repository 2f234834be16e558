"""Capsules that are damaged as any GGUF file may be, for both readers. Each entry maps a good capsule to a bad one, and has a pattern for the line that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_gguf import rewrite

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


def _tensors_reversed(good: Path, bad: Path) -> None:
    names = [t.name for t in gguf.GGUFReader(good).tensors]
    data = {t.name: np.array(t.data) for t in gguf.GGUFReader(good).tensors}
    rewrite(good, bad, tensors=dict.fromkeys(names), add=[(n, data[n]) for n in reversed(names)])


K = "blk.1.kvcapsule."
DAMAGES: dict[str, tuple[Damage, str]] = {
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
    "another adapter": (key("adapter.type", "lora", STR), "capsule"),
    "no version": (without("kvcapsule.version"), "version"),
    "version is a string": (key("kvcapsule.version", "1", STR), "version"),
    "another fingerprint": (key("kvcapsule.base.fingerprint", "0" * 64, STR), "fingerprint"),
    "no fingerprint": (without("kvcapsule.base.fingerprint"), "fingerprint"),
    "another number of layers": (key("kvcapsule.base.block_count", 3), "layers|block_count"),
    "another architecture": (lambda good, bad: rewrite(good, bad, kv={
        "kvcapsule.base.architecture": ("qwen2", STR), "general.architecture": ("qwen2", STR)}), "architecture"),
    "a layer too many": (key("kvcapsule.layers", [1, 2]), "layer"),
    "a layer twice": (key("kvcapsule.layers", [1, 1]), "layer"),
    "infinite mean": (tensor(K + "v_mean", put(np.inf, 0, 1)), "v_mean"),
    "a tensor too many": (lambda good, bad: rewrite(good, bad, add=[("blk.0.kvcapsule.extra", np.ones(4, np.float32))]), "extra"),
    "a foreign tensor": (lambda good, bad: rewrite(good, bad, add=[("blk.0.attn_q.weight", np.ones(4, np.float32))]), "attn_q"),
    "fingerprint is not hex": (key("kvcapsule.base.fingerprint", "x" * 64, STR), "fingerprint"),
    "RoPE kind": (key("kvcapsule.base.rope.type", "spiral", STR), "rope.type"),
    "unknown key": (lambda g, b: rewrite(g, b, kv={"kvcapsule.extra": (1, U32)}), "unknown key kvcapsule.extra"),
    "bytes behind the end": (raw(lambda b: b + bytes(10_000)), "belong to nothing"),
    "many keys": (lambda g, b: rewrite(g, b, kv={f"kvcapsule.train.{i}": (i, U32) for i in range(300)}), "more than 256"),
    "a long array": (key("kvcapsule.layers", list(range(70_000))), "array"),
    "a false array length": (raw(lambda b: length_of(b, b"kvcapsule.layers", 1 << 60)), "incomplete|array"),
    "a tensor twice": (raw(lambda b: b.replace(b"blk.1.kvcapsule.v_mean", b"blk.1.kvcapsule.k_mean")), "k_mean is there twice"),
    "overlap": (raw(lambda b: offset_of(b, b"blk.1.kvcapsule.v_mean", 0)), "is at offset 0, not"),
    "a foreign key": (key("tokenizer.chat_template", "{{ 7 * 7 }}", STR), "unknown key tokenizer.chat_template"),
    "a value with a zero byte": (key("kvcapsule.base.rope.type", "norm\0x", STR), "rope.type is not printable"),
    "bytes in the padding": (_dirty_padding, "padding"),
    "a long key": (lambda g, b: rewrite(g, b, kv={"kvcapsule.train." + "x" * 300: (1, U32)}), "name of a key has 316 bytes"),
    "alignment of 48": (key("general.alignment", 48), "general.alignment"),
    "alignment is a string": (key("general.alignment", "32", STR), "general.alignment"),
    "architectures differ": (key("general.architecture", "qwen2", STR), "general.architecture is not"),
    "type is not adapter": (key("general.type", "model", STR), "general.type is not"),
    "an adapter.type that is a number": (key("adapter.type", 1), "adapter.type is not"),
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
    **{f"no {t}": (without(K + t), t) for t in ("k_mean", "v_mean")},
    "a long string": (key("kvcapsule.base.rope.type", "a" * 70_000, STR), "string"),
    "a false string length": (raw(lambda b: length_of(b, b"kvcapsule.base.rope.type", 1 << 60)), "incomplete"),
    "a key twice": (raw(lambda b: b.replace(b"kvcapsule.key_energy", b"kvcapsule.layer_rope")), "layer_rope is there twice"),
    "a key hidden by a zero byte": (raw(lambda b: b.replace(b"kvcapsule.key_energy", b"kvcapsule.key\0energy")), "printable"),
    "a control character": (key("kvcapsule.base.rope.type", "\x1b[2Jnorm\n", STR), "rope.type is not printable"),
    "u64 for u32": (key("kvcapsule.base.block_count", 2, gguf.GGUFValueType.UINT64), "block_count is u64, not u32"),
    "number for an array": (key("kvcapsule.layers", 0), "layers is u32, not an array"),
}  # fmt: skip

# strange, but nothing is wrong with it: both readers take it
ACCEPTED: dict[str, Damage] = {
    "GGUF version 2": raw(lambda b: b[:4] + (2).to_bytes(4, "little") + b[8:]),
    "a bool of 2": raw(lambda b: tensor_field(b, b"kvcapsule.layer_rope", 16, 2, 1)),
    "a name that is not UTF-8": raw(lambda b: b.replace(b"random capsule", b"random \xff\x00psule")),
    "provenance of any type": lambda good, bad: rewrite(good, bad, kv={"kvcapsule.train.losses": ([1.0, float("nan")], F32), "general.tags": (["a", "b"], STR)}),
    "other tensors first": lambda good, bad: _tensors_reversed(good, bad),
}  # fmt: skip
