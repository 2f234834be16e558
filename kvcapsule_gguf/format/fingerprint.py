"""The fingerprint of a base model: the same for every quantization of it, another one for every other model (docs/reference/format-v2.md)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .base_model import BaseModel, read_base_model
from .capsule import Base


def fingerprint(path: str | Path) -> str:
    """64 hex digits. Raises CapsuleError."""
    return fingerprint_of(read_base_model(path))


def base_of(model: BaseModel) -> Base:
    return Base(model.architecture, model.block_count, fingerprint_of(model), model.rope_type, model.rope_sections)


def fingerprint_of(model: BaseModel) -> str:
    def join(values: list[int]) -> str:
        return ",".join(map(str, values))

    sha = hashlib.sha256(
        f"kvcapsule-base-v1\narch={model.architecture}\nblock_count={model.block_count}\nembedding_length={model.embedding_length}\n"
        f"head_count_kv={join(model.head_count_kv)}\nkey_length={join(model.key_length)}\nvalue_length={join(model.value_length)}\n".encode()
    )
    for name in sorted(model.norms, key=lambda s: s.encode()):
        sha.update(name.encode() + b"\n")
        sha.update(model.norms[name].astype("<f4").tobytes())
    return sha.hexdigest()
