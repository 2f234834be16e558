"""Writes tests/attacks/files/: one small capsule for each class of hole that parsers of GGUF files have had.

Each is a good capsule for a tiny model but for one thing, so that only the check for that thing stands in its way. The note says which hole; numbers
of issues and pull requests are llama.cpp's.
"""

from __future__ import annotations

import pickle
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from damages import F32, STR, U8, U32, Damage, key, kind_of, length_of, offset_of, put, raw, tensor, tensor_field  # noqa: E402
from make_capsule import MIXED, random_capsule  # noqa: E402
from tiny_gguf import TinyModel, rewrite, write  # noqa: E402

FILES = HERE / "files"
MODEL = TinyModel(arch="llama", n_layer=1, n_head_kv=1, n_head=2, head=32, n_ff=32)

V = b"blk.0.kvcapsule.v_mean"
K_TABLE = b"blk.0.kvcapsule.k_table"
AXES = b"blk.0.kvcapsule.v_axes"


def number(at: int, value: int, size: int = 8) -> Damage:
    return raw(lambda b: b[:at] + value.to_bytes(size, "little") + b[at + size :])


def shape(name: bytes, *ne: int) -> Damage:
    """Sets the dimensions of a 2-dimensional tensor."""

    def damage(b: bytes) -> bytes:
        for i, n in enumerate(ne):
            b = tensor_field(b, name, 4 + 8 * i, n, 8)
        return b

    return raw(damage)


def sums_that_wrap(b: bytes) -> bytes:
    """Tensors of 2**62 bytes each, with the offsets that their wrapped sum asks for."""
    for i, name in enumerate([b"blk.0.kvcapsule.k_mean", V]):
        for j, n in enumerate((1 << 30, 1 << 30)):
            b = tensor_field(b, name, 4 + 8 * j, n, 8)
        b = offset_of(b, name, (i << 62) % (1 << 64))
    return b


def in_mmproj(damage: dict) -> Damage:
    kv = {"general.type": ("mmproj", STR), "adapter.type": None, "general.architecture": ("clip", STR)}
    return lambda good, bad: rewrite(good, bad, kv=kv, **damage)


def hidden_key(good: Path, bad: Path) -> None:
    """A second version behind a zero byte: C strings end there."""
    rewrite(good, bad, kv={"kvcapsule.versionX9": (1, U32)})
    bad.write_bytes(bad.read_bytes().replace(b"kvcapsule.versionX9", b"kvcapsule.version\x009"))


# name -> (the hole, how the file is made)
ATTACKS: dict[str, tuple[str, Damage]] = {
    "count-keys": ("CVE-2024-21802 and its sisters: a count is allocated before it is checked", number(16, 1 << 60)),
    "count-negative": ("the same, a count that is negative as int64", number(8, (1 << 64) - 1)),
    "count-tensors": ("the same, tensors", number(8, 1 << 60)),
    "array-length": ("the same, the length of an array: n * size wraps to 0", raw(lambda b: length_of(b, b"kvcapsule.layers", 1 << 62))),
    "string-length": ("the same, the length of a string", raw(lambda b: length_of(b, b"kvcapsule.base.rope.type", (1 << 64) - 8))),
    "nelements-wraps": ("#27203: the number of elements overflows to what is expected", shape(K_TABLE, (1 << 62) + 1)),
    "padding-wraps": ("#26318: a size that wraps when it is padded", shape(K_TABLE, (1 << 63) - 1, 1)),
    "zero-dimension": ("#24263: a division by a dimension of 0", shape(AXES, 0)),
    "axes-of-another-head": ("#29128: the LoRA loader accepted any ne[2]", tensor("blk.0.kvcapsule.v_axes", lambda a: np.concatenate([a, a]))),
    "array-element-type": ("#26690: the type of an array's elements was not checked before the cast", key("kvcapsule.base.key_length", [32], U8)),
    "bits-shift": ("a number that a shift is made by", tensor("blk.0.kvcapsule.k_table", put(64, 0, 0, 7, 0))),
    "bits-signed": ("CVE-2026-21869: a count that is negative when signed", tensor("blk.0.kvcapsule.v_table", put(-128, 1, 0, 32, 0))),
    "rope-signed": ("CVE-2025-52566: a size that is negative when signed", key("kvcapsule.base.rope.dimension_count", 0xFFFFFFFE)),
    "heads-signed": ("the same, a number of heads", key("kvcapsule.base.head_count_kv", [0x80000001])),
    "layer-index": ("LM Studio #2289: an index out of range", key("kvcapsule.layers", [0xFFFFFFFF])),
    "no-bytes": ("#24263: a division by a size of 0", lambda good, bad: rewrite(good, bad, tensors={
        f"blk.0.kvcapsule.{t}": lambda a: a * np.array([1, 0], np.int8)[:, None, None, None] for t in ("k_table", "v_table")})),
    "nan-energy": ("a threshold that no comparison is true for", key("kvcapsule.key_energy", [float("nan")], F32)),
    "infinite-size": ("the same, a size", key("kvcapsule.smaller", lambda v: [float("inf"), *v[1:]], F32)),
    "nan-axes": ("one NaN poisons the cache of every layer", tensor("blk.0.kvcapsule.v_axes", put(np.nan, 0, 3, 3))),
    "loud-axes": ("values that are infinite in the cache's type", tensor("blk.0.kvcapsule.v_axes", lambda a: 1000 * a)),
    "huge-mean": ("the same, a mean", tensor("blk.0.kvcapsule.v_mean", put(3e38, 0, 0))),
    "both-formats": ("a file that two readers take for two things", lambda good, bad: rewrite(good, bad, kv={"kvcapsule.block_size": (64, U32)})),
    "escape-codes": ("text that rewrites the terminal or the log", key("kvcapsule.base.rope.type", "norm\x1b]0;owned\x07", STR)),
    "template": ("CVE-2026-5760, CVE-2024-34359: a template that the reader renders", key("tokenizer.chat_template", "{{ ''.__class__.__mro__ }}", STR)),
    "truncated": ("CVE-2026-7482: the file ends inside its last tensor", raw(lambda b: b[:-100])),
    "offset-behind-the-end": ("the same, memory of the process is read", raw(lambda b: offset_of(b, b"blk.0.kvcapsule.v_mean", 1 << 40))),
    "in-an-mmproj": ("LM Studio #2289: the same inside an mmproj", in_mmproj({"tensors": {"blk.0.kvcapsule.v_axes": lambda a: a[:, :4].copy()}})),
    "hidden-bytes": ("bytes that no tensor covers", raw(lambda b: b + b"#!/bin/sh\n" * 8)),
    "duplicate-tensor": ("two tensors of one name", raw(lambda b: b.replace(b"blk.0.kvcapsule.v_table", b"blk.0.kvcapsule.k_table"))),
    "sizes-sum-wraps": ("CVE-2025-53630, CVE-2026-27940: the sum of the tensors' sizes overflows", raw(sums_that_wrap)),
    "nbytes-wraps": ("CVE-2026-33298: the bytes of a tensor overflow", shape(V, 1 << 62, 1)),
    "value-type": ("#26690: a string where a number is expected", key("kvcapsule.base.block_count", "1", STR)),
    "alignment-type": ("#26318: general.alignment of another type", key("general.alignment", "32", STR)),
    "alignment-zero": ("the same, 0", key("general.alignment", 0)),
    "empty-key": ("#24263: a key without a name", raw(lambda b: b[:24] + bytes(8) + b[24 + 8 + struct.unpack("<Q", b[24:32])[0] :])),
    "many-dimensions": ("more than four dimensions", raw(lambda b: tensor_field(b, V, 0, 5, 4))),
    "unknown-array-type": ("kekzl/imp #532: a loop without end on an unknown type", raw(lambda b: kind_of(b, b"kvcapsule.layers", 13))),
    "nested-arrays": ("the same, arrays of arrays", raw(lambda b: kind_of(b, b"kvcapsule.layers", 9))),
    "hidden-key": ("a key that C and Python read differently", hidden_key),
    "pickle": ("safetensors' attacks/: code where data is expected", raw(lambda b: pickle.dumps({"weights": list(range(100))}, protocol=2))),
}  # fmt: skip


def good_file(model: Path, folder: Path) -> Path:
    """The file that the attacks are made from."""
    return random_capsule(model, folder / "good.gguf", tiers=[(1, 2, 3, 4), MIXED])


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        good = good_file(write(MODEL, Path(scratch) / "model.gguf"), Path(scratch))
        for name, (_, damage) in ATTACKS.items():
            damage(good, folder / f"{name}.gguf")


if __name__ == "__main__":
    make(FILES)
