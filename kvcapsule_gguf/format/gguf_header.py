"""A strict, bounded reader of GGUF headers (version 3, little-endian): trusts no count, length or offset of the file.

gguf-py's reader is made for files one has made oneself: a false array length keeps it busy for ever. Only the keys that are asked for are kept,
the others are skipped, so that the vocabulary of a base model costs nothing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAX_STRING = 64 * 1024
MAX_ARRAY = 65_536
MAX_DIMS = 4

# GGUF value types: struct format of one element
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPE_NAMES = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "str", 9: "array", 10: "u64", 11: "i64", 12: "f64"}
STRING, ARRAY = 8, 9

# ggml tensor types that this package reads: (name, numpy type)
DTYPES = {0: ("F32", np.dtype("<f4")), 1: ("F16", np.dtype("<f2")), 26: ("I32", np.dtype("<i4"))}


class GGUFError(ValueError):
    """The file is not GGUF, or damaged: one line, without the name of the file."""


@dataclass(frozen=True)
class Value:
    """A metadata value: `type` is a name of TYPE_NAMES, of the elements if `array`."""

    type: str
    array: bool
    data: Any


@dataclass(frozen=True)
class TensorInfo:
    """`ne` is ggml's order (contiguous dimension first), `offset` counts from the start of the file; `dtype` is None for types not in DTYPES."""

    name: str
    type: int
    type_name: str
    dtype: np.dtype | None
    ne: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        n = 1
        for x in self.ne:
            n *= x
        return n * (self.dtype.itemsize if self.dtype else 0)


@dataclass
class Header:
    path: Path
    size: int
    n_kv: int
    values: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    data_start: int = 0

    def read(self, info: TensorInfo) -> np.ndarray:
        """The data of a tensor, in numpy's order of dimensions (reversed `ne`)."""
        if info.dtype is None:
            raise GGUFError(f"tensor {info.name} has an unexpected type {info.type_name}")
        if info.offset + info.nbytes > self.size:
            raise GGUFError(f"tensor {info.name} ends behind the end of the file, which is incomplete")
        with self.path.open("rb") as f:
            f.seek(info.offset)
            data = f.read(info.nbytes)
        return np.frombuffer(data, dtype=info.dtype).reshape(info.ne[::-1]).astype(info.dtype.newbyteorder("="))


def read_header(path: str | Path, keep: Callable[[str], bool] = lambda key: True) -> Header:
    """Reads the metadata whose keys `keep` accepts and all tensor infos. Raises GGUFError, or OSError."""
    path = Path(path)
    with path.open("rb") as f:
        size = f.seek(0, 2)
        if size < 24:
            raise GGUFError("not a GGUF file: shorter than a GGUF header")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data, size).header(path, keep)


class _Parser:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def unpack(self, fmt: str) -> Any:
        n = struct.calcsize("<" + fmt)
        self.need(n)
        out = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += n
        return out[0]

    def need(self, n: int) -> None:
        if n > self.size - self.at:
            raise GGUFError("the file ends inside its header, it is incomplete")

    def string(self, limit: int | None) -> str:
        n = self.unpack("Q")
        self.need(n)
        if limit is None:
            self.at += n
            return ""
        if n > limit:
            raise GGUFError(f"a string of {n} bytes, more than {limit}")
        raw = self.data[self.at : self.at + n]
        self.at += n
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError("a string is not UTF-8") from None
        return text

    def value(self, key: str, kept: bool) -> Value | None:
        kind = self.unpack("I")
        if kind != ARRAY:
            data = self.scalar(key, kind, kept)
            return Value(TYPE_NAMES[kind], False, data) if kept else None
        item, n = self.unpack("I"), self.unpack("Q")
        if kept and n > MAX_ARRAY:
            raise GGUFError(f"key {key} is an array of {n} elements, more than {MAX_ARRAY}")
        if item in SCALARS:
            width = struct.calcsize("<" + SCALARS[item])
            self.need(n * width)
            start = self.at
            self.at += n * width
            if not kept:
                return None
            return Value(TYPE_NAMES[item], True, np.frombuffer(self.data[start : self.at], dtype=np.dtype("<" + SCALARS[item])).copy())
        if item != STRING:
            raise GGUFError(f"key {key} is an array of an unknown type {item}")
        self.need(8 * n)
        strings = [self.string(MAX_STRING if kept else None) for _ in range(n)]
        return Value("str", True, strings) if kept else None

    def scalar(self, key: str, kind: int, kept: bool) -> Any:
        if kind == STRING:
            text = self.string(MAX_STRING if kept else None)
            return text if kept else None
        if kind not in SCALARS:
            raise GGUFError(f"key {key} has an unknown type {kind}")
        out = self.unpack(SCALARS[kind])
        return out if kept else None

    def header(self, path: Path, keep: Callable[[str], bool]) -> Header:
        self.need(4)
        if self.data[:4] != b"GGUF":
            raise GGUFError("not a GGUF file")
        self.at = 4
        version, n_tensors, n_kv = self.unpack("I"), self.unpack("Q"), self.unpack("Q")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version if version < 2**16 else 'of a big-endian file'}, only 2 and 3 (little-endian) are read")
        self.need(n_kv * 12)  # the least that a key and a tensor take
        self.need(n_tensors * 24)
        out = Header(path, self.size, n_kv)
        alignment = 32
        keys: set[str] = set()
        for _ in range(n_kv):
            key = self.string(MAX_STRING)
            if key in keys:
                raise GGUFError(f"key {key} is there twice")
            keys.add(key)
            value = self.value(key, keep(key) or key == "general.alignment")
            if key == "general.alignment":
                alignment = value.data if value.type == "u32" and not value.array else 0
                if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                    raise GGUFError("general.alignment is not a power of two")
            elif value is not None:
                out.values[key] = value
        infos = [self.tensor() for _ in range(n_tensors)]
        out.data_start = -(-self.at // alignment) * alignment
        for info in infos:
            if info.name in out.tensors:
                raise GGUFError(f"tensor {info.name} is there twice")
            if info.offset % alignment:
                raise GGUFError(f"tensor {info.name} is not aligned")
            out.tensors[info.name] = TensorInfo(info.name, info.type, info.type_name, info.dtype, info.ne, out.data_start + info.offset)
        return out

    def tensor(self) -> TensorInfo:
        name = self.string(MAX_STRING)
        n_dims = self.unpack("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise GGUFError(f"tensor {name} has {n_dims} dimensions")
        ne = tuple(self.unpack("Q") for _ in range(n_dims))
        total = 1
        for x in ne:
            total *= x
            if x < 1 or total > 2**62:
                raise GGUFError(f"tensor {name} has the impossible shape {list(ne)}")
        kind, offset = self.unpack("I"), self.unpack("Q")
        type_name, dtype = DTYPES.get(kind, (f"type {kind}", None))
        return TensorInfo(name, kind, type_name, dtype, ne, offset)
