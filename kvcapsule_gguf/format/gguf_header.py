"""A strict, bounded reader of GGUF headers (version 3, little-endian): trusts no count, length or offset of the file.

gguf-py's reader is made for files one has made oneself: a false array length keeps it busy for ever. Only the keys that are asked for are kept,
the others are skipped, so that the vocabulary of a base model costs nothing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

# limits of any file
MAX_COUNT = 65_536  # keys, tensors
MAX_NAME = 256
MAX_TENSOR_NAME = 63
MAX_ALIGNMENT = 65_536
MAX_ELEMENTS = 1 << 40
MAX_DIMS = 4
# limits of the values that are kept
MAX_STRING = 64 * 1024
MAX_ARRAY = 65_536

# GGUF value types: struct format of one element
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPE_NAMES = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "str", 9: "array", 10: "u64", 11: "i64", 12: "f64"}
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"

# ggml tensor types: (name, values of a block, bytes of a block)
TENSOR_TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 36), 10: ("q2_K", 256, 84), 11: ("q3_K", 256, 110), 12: ("q4_K", 256, 144), 13: ("q5_K", 256, 176), 14: ("q6_K", 256, 210),
    15: ("q8_K", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2),
    26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip
# the types that this package reads
DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i32": np.dtype("<i4"), "i8": np.dtype("i1")}


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
    """`ne` is ggml's order (contiguous dimension first), `offset` counts from the start of the file, `nbytes` is without padding."""

    name: str
    type_name: str
    ne: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def ne4(self) -> tuple[int, ...]:
        """All four dimensions, as ggml has them."""
        return self.ne + (1,) * (MAX_DIMS - len(self.ne))


@dataclass
class Header:
    """`end` is where the header proper ends; the data starts at the next multiple of `alignment`."""

    path: Path
    size: int
    n_kv: int
    end: int = 0
    alignment: int = 32
    values: dict[str, Value] = field(default_factory=dict)
    skipped: str = ""  # the first key that was not kept
    tensors: dict[str, TensorInfo] = field(default_factory=dict)  # in the order of their data

    def read(self, info: TensorInfo) -> np.ndarray:
        """The data of a tensor, in numpy's order of dimensions (reversed `ne`)."""
        dtype = DTYPES.get(info.type_name)
        if dtype is None:
            raise GGUFError(f"tensor {info.name} has an unexpected type {info.type_name}")
        data = self.bytes(info.offset, info.nbytes)
        if len(data) < info.nbytes:
            raise GGUFError(f"tensor {info.name} reaches behind the end of the file, which is incomplete")
        return np.frombuffer(data, dtype=dtype).reshape(info.ne[::-1]).astype(dtype.newbyteorder("="))

    def bytes(self, offset: int, n: int) -> bytes:
        """At most `n` bytes of the file."""
        if offset >= self.size:
            return b""
        with self.path.open("rb") as f:
            f.seek(offset)
            return f.read(min(n, self.size - offset))


def read_header(path: str | Path, keep: Callable[[str], bool] = lambda key: True) -> Header:
    """Reads the metadata whose keys `keep` accepts and all tensor infos. Raises GGUFError, or OSError."""
    path = Path(path)
    with path.open("rb") as f:
        size = f.seek(0, 2)
        if size < 24:
            raise GGUFError("not a GGUF file")
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

    def take(self, n: int) -> bytes:
        self.need(n)
        self.at += n
        return self.data[self.at - n : self.at]

    def name(self, what: str) -> str:
        n = self.unpack("Q")
        self.need(n)
        if not 1 <= n <= MAX_NAME:
            raise GGUFError(f"the name of a {what} has {n} bytes, not 1..{MAX_NAME}")
        raw = self.take(n)
        if not is_plain(raw):
            raise GGUFError(f"the name of a {what} is not printable ASCII")
        return raw.decode("ascii")

    def string(self, key: str, kept: bool) -> str:
        """A value; what does not have to be plain may be any bytes."""
        n = self.unpack("Q")
        self.need(n)
        if not kept:
            self.at += n
            return ""
        if n > MAX_STRING:
            raise GGUFError(f"key {key} has a string of {n} bytes, more than {MAX_STRING}")
        raw = self.take(n)
        if must_be_plain(key) and not is_plain(raw):
            raise GGUFError(f"key {key} is not printable ASCII")
        return raw.decode("utf-8", errors="replace")

    def value(self, key: str, kept: bool) -> Value | None:
        kind = self.kind(key)
        if kind != ARRAY:
            data = self.string(key, kept) if kind == STRING else self.unpack(SCALARS[kind])
            return Value(TYPE_NAMES[kind], False, data) if kept else None
        item, n = self.kind(key), self.unpack("Q")
        if item == ARRAY:
            raise GGUFError(f"key {key} is an array of arrays")
        if kept and n > MAX_ARRAY:
            raise GGUFError(f"key {key} is an array of {n} elements, more than {MAX_ARRAY}")
        if item == STRING:
            self.need(8 * n)
            strings = [s for s in (self.string(key, kept) for _ in range(n)) if kept]
            return Value("str", True, strings) if kept else None
        width = struct.calcsize("<" + SCALARS[item])
        self.need(n * width)
        start = self.at
        self.at += n * width
        if not kept:
            return None
        # a bool is any byte but 0, as in ggml
        data = np.frombuffer(self.data[start : self.at], dtype=np.dtype("<" + SCALARS[item].replace("?", "B"))).copy()
        return Value(TYPE_NAMES[item], True, data != 0 if TYPE_NAMES[item] == "bool" else data)

    def kind(self, key: str) -> int:
        kind = self.unpack("I")
        if kind not in TYPE_NAMES:
            raise GGUFError(f"key {key} has an unknown type {kind}")
        return kind

    def header(self, path: Path, keep: Callable[[str], bool]) -> Header:
        if self.take(4) != b"GGUF":
            raise GGUFError("not a GGUF file")
        version, n_tensors, n_kv = self.unpack("I"), self.unpack("Q"), self.unpack("Q")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version}, only 2 and 3 (little-endian) are read")
        if max(n_kv, n_tensors) > MAX_COUNT:
            raise GGUFError(f"{n_kv} keys and {n_tensors} tensors, more than {MAX_COUNT}")
        out = Header(path, self.size, n_kv)
        keys: set[str] = set()
        for _ in range(n_kv):
            key = self.name("key")
            if key in keys:
                raise GGUFError(f"key {key} is there twice")
            keys.add(key)
            value = self.value(key, keep(key) or key == ALIGNMENT)
            if value is None:
                out.skipped = out.skipped or key
            elif key == ALIGNMENT:
                out.alignment = value.data if (value.type, value.array) == ("u32", False) else 0
                if not 1 <= out.alignment <= MAX_ALIGNMENT or out.alignment & (out.alignment - 1):
                    raise GGUFError(f"general.alignment is not a power of two up to {MAX_ALIGNMENT}")
            else:
                out.values[key] = value
        infos = []
        names: set[str] = set()
        for _ in range(n_tensors):
            infos.append(self.tensor())
            if infos[-1].name in names:
                raise GGUFError(f"tensor {infos[-1].name} is there twice")
            names.add(infos[-1].name)
        out.end = self.at
        start, offset = padded(self.at, out.alignment), 0
        for info in infos:  # ggml wants the tensors one after the other, in their order in the header
            if info.offset != offset:
                raise GGUFError(f"tensor {info.name} is at offset {info.offset}, not at {offset} behind the one before it")
            offset += padded(info.nbytes, out.alignment)
            out.tensors[info.name] = replace(info, offset=start + info.offset)
        return out

    def tensor(self) -> TensorInfo:
        name = self.name("tensor")
        if len(name) > MAX_TENSOR_NAME:
            raise GGUFError(f"tensor {name} has a name of {len(name)} bytes, more than {MAX_TENSOR_NAME}")
        n_dims = self.unpack("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise GGUFError(f"tensor {name} has {n_dims} dimensions, not 1..{MAX_DIMS}")
        ne, total = [], 1
        for _ in range(n_dims):
            ne.append(self.unpack("Q"))
            total *= ne[-1]
            if not 1 <= total <= MAX_ELEMENTS:
                raise GGUFError(f"tensor {name} has an impossible shape")
        kind = self.unpack("I")
        if kind not in TENSOR_TYPES:
            raise GGUFError(f"tensor {name} has an unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if ne[0] % block:
            raise GGUFError(f"tensor {name} has rows of {ne[0]}, not a multiple of the blocks of {type_name}")
        return TensorInfo(name, type_name, tuple(ne), self.unpack("Q"), total // block * block_bytes)


def padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def is_plain(raw: bytes) -> bool:
    return all(0x20 <= c < 0x7F for c in raw)


def must_be_plain(key: str) -> bool:
    """Strings that are compared or shown as they are."""
    return key in ("general.type", "general.architecture", "adapter.type") or (key.startswith("kvcapsule.") and not key.startswith("kvcapsule.train."))
