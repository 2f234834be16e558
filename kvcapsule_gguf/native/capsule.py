"""Thin wrappers of the capsule API. `model` and `ctx` are pointers, as numbers."""

from __future__ import annotations

import ctypes as c
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import CapsuleError
from .library import Library, llama_cpp, load
from .shapes import layer_shapes


@dataclass(frozen=True)
class TierStats:
    """Slots of one tier. smaller: f16 bytes over those of a slot of 8 x 8 tokens; size: bytes of the slots in use, all layers."""

    smaller: float
    slots: int
    tokens: int
    size: int


@dataclass(frozen=True)
class CapsuleStats:
    """What llama_capsule_get_stats() counts; sizes in bytes, all layers; tiers are from the smallest."""

    n_hot: int
    n_hot_used: int
    n_hot_vision: int
    n_cold: int
    bytes_slots: int
    bytes_pools: int
    bytes_scratch: int
    bytes_hot: int
    bytes_f16_token: int
    n_heads: int = 0  # KV heads
    n_heads_narrow: int = 0  # of them, those that see no other image while an image is read
    n_tokens_narrow: int = 0  # vision tokens that were read so
    tiers: tuple[TierStats, ...] = ()

    @property
    def slots(self) -> dict[str, int]:
        """Slots in use by tier: "6.25x", "5.50x", ..."""
        return {f"{t.smaller:.2f}x": t.slots for t in self.tiers}

    @property
    def vision_tokens(self) -> int:
        return self.n_cold + self.n_hot_vision

    @property
    def kv_bytes(self) -> int:
        """Of the vision tokens: slots in use, and the hot cells that still hold some."""
        hot = self.n_hot_vision * self.bytes_hot // self.n_hot if self.n_hot else 0
        return self.bytes_slots + hot

    @property
    def kv_bytes_f16(self) -> int:
        """Of the same vision tokens in an f16 cache."""
        return self.vision_tokens * self.bytes_f16_token

    @property
    def bytes_allocated(self) -> int:
        return self.bytes_hot + self.bytes_pools + self.bytes_scratch


class Capsule:
    """A capsule file bound to a model, or the built-in capsule. It may be closed before the contexts that use it."""

    def __init__(self, handle: int) -> None:
        self.handle: int | None = handle

    @classmethod
    def load(cls, model: int, path: str | os.PathLike) -> Capsule:
        """Raises CapsuleError if the file is damaged or made for another model."""
        handle = _lib().llama_capsule_load_from_file(model, os.fsencode(path))
        if not handle:
            raise CapsuleError(last_error() or f"{os.fspath(path)}: cannot be loaded as a capsule")
        return cls(handle)

    @classmethod
    def builtin(cls, model: int) -> Capsule:
        """Needs no file. Raises CapsuleError if the model is not supported."""
        handle = _lib().llama_capsule_init_default(model)
        if not handle:
            raise CapsuleError(last_error() or "this model has no built-in capsule")
        return cls(handle)

    def close(self) -> None:
        if self.handle:
            _lib().llama_capsule_free(self.handle)
            self.handle = None

    def __enter__(self) -> Capsule:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


IMAGE_ATTENTION = ("full", "auto", "measure")  # in the library's order
CANNOT_ATTACH = "can not attach the capsule: "
ASK_THE_LOG = "the context can not be created, the log says why"  # llama-capsule.cpp


@dataclass(frozen=True)
class Attachment:
    """How a context uses a capsule. capsule: None = not at all; n_hot: cells of the hot cache, 0 = default; quality: the error that a tile may have, in units of
    q4_0's, 0 = the capsule's default; ratio: share to save, in its place, 0 = by quality.
    image_attention: one of IMAGE_ATTENTION, full = all heads see all pictures; auto = those that the capsule names see no other picture while a picture is read.
    image_tokens: of each picture, where all have the same number, 0 = not known; otherwise: is told why a context cannot have the capsule, which is then made without."""

    capsule: Capsule | None
    n_hot: int = 0
    quality: float = 0.0
    ratio: float = 0.0
    auto_compress: bool = True
    image_tokens: int = 0
    image_attention: str = "full"
    otherwise: Callable[[str], None] | None = None


def init_context(model: int, params: Any, wanted: Attachment) -> int | None:
    """llama_init_from_model() with a capsule of this model; None if it failed, with a capsule last_error() says why."""
    if wanted.capsule is None:
        return load().llama.llama_init_from_model(model, params)
    lib = _lib()
    raw = lib.llama_capsule_context_default_params()
    raw.size = c.sizeof(raw)
    raw.capsule = wanted.capsule.handle
    raw.n_hot, raw.quality, raw.ratio = wanted.n_hot, wanted.quality, wanted.ratio
    raw.auto_compress, raw.image_tokens = wanted.auto_compress, wanted.image_tokens
    raw.image_attention = IMAGE_ATTENTION.index(wanted.image_attention)
    ctx = lib.llama_capsule_init_from_model(model, params, raw)
    if not ctx and wanted.otherwise is not None and (said := last_error()).startswith(CANNOT_ATTACH):
        wanted.otherwise(said.removeprefix(CANNOT_ATTACH))
        return load().llama.llama_init_from_model(model, params)
    return ctx


def why_no_context(model: int, n_ctx: int, with_capsule: bool, said: str) -> str:
    """One line for the user after init_context() has failed; said: llama.cpp's own error, "" if it is not known."""
    reason = last_error() if with_capsule else ""
    if said and reason in ("", ASK_THE_LOG):
        reason = said
    trained = load().llama.llama_model_n_ctx_train(model)
    if n_ctx > trained:
        size = 2 * n_ctx * sum(n * (d_k + d_v) for n, d_k, d_v in layer_shapes(model))
        reason += f"{'; ' if reason else ''}{n_ctx} tokens take {size / 2**30:,.1f} GiB in f16, and this model was trained with {trained}: a context of at most {trained} makes sense"
    return reason or "unknown reason"


_thread = threading.local()


@contextmanager
def attached(wanted: Callable[[], Attachment | None]) -> Iterator[None]:
    """Contexts that llama_cpp.Llama creates in this thread meanwhile get what `wanted` says then; None = what they would get anyway."""
    llama: Any = llama_cpp()
    if not hasattr(llama.llama_init_from_model, "plain"):
        plain = llama.llama_init_from_model

        def init(model: int, params: Any) -> int | None:
            asked = getattr(_thread, "wanted", None)
            _thread.wanted = None
            found = asked() if asked else None
            return init_context(model, load().llama.llama_context_params.from_buffer(params), found) if found else plain(model, params)

        init.plain = plain  # type: ignore[attr-defined]
        llama.llama_init_from_model = init
    _thread.wanted = wanted
    try:
        yield
    finally:
        _thread.wanted = None


def environment_capsule() -> Path | None:
    """The file that LLAMA_KVCAPSULE names for every context; None if it names none, or asks for the built-in capsule."""
    name = os.environ.get("LLAMA_KVCAPSULE")
    return Path(name) if name and name != "auto" else None


def is_attached(ctx: int) -> bool:
    native = load()
    return native.has_capsule and bool(native.llama.llama_capsule_is_attached(ctx))


def compress(ctx: int, seq: int, p0: int, p1: int) -> int:
    """Moves the vision tokens of `seq` at positions [p0, p1) into slots; returns how many tokens. Raises CapsuleError."""
    return _check(_lib().llama_capsule_compress(ctx, seq, p0, p1), "compression failed")


def stats(ctx: int) -> CapsuleStats:
    """Raises CapsuleError if no capsule is attached."""
    lib = _lib()
    raw = lib.llama_capsule_stats(size=c.sizeof(lib.llama_capsule_stats))
    _check(-abs(lib.llama_capsule_get_stats(ctx, c.byref(raw))), "no capsule is attached")
    values = {f.name: getattr(raw, f.name) for f in fields(CapsuleStats) if f.name != "tiers"}
    tiers = (TierStats(raw.smaller[i], raw.n_slots_tier[i], raw.n_cold_tier[i], raw.bytes_tier[i]) for i in range(raw.n_tiers))
    return CapsuleStats(**values, tiers=tuple(tiers))


def read_kv(ctx: int, layer: int, shape: tuple[int, int, int], *, seq: int = 0, p0: int = 0, p1: int = -1, n_max: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Keys without RoPE and values of the hot cells of `seq` at positions [p0, p1), p1 < 0 = to the end, ordered by position.

    shape: (n_head_kv, d_k, d_v) of the layer, see layer_shapes(); n_max: room for so many cells, default the size of the context.
    Returns k [n, n_head_kv, d_k] and v [n, n_head_kv, d_v], float32. Raises CapsuleError."""
    lib = _lib()
    heads, d_k, d_v = shape
    n_max = load().llama.llama_n_ctx(ctx) if n_max is None else n_max
    k = np.empty((n_max, heads, d_k), np.float32)
    v = np.empty((n_max, heads, d_v), np.float32)
    floats = c.POINTER(c.c_float)
    p1 = np.iinfo(np.int32).max if p1 < 0 else p1
    n = _check(
        lib.llama_capsule_read_kv(ctx, seq, p0, p1, layer, k.ctypes.data_as(floats), v.ctypes.data_as(floats), n_max),
        f"reading the cache of layer {layer} failed",
    )
    return k[:n].copy(), v[:n].copy()


def fingerprint(model: int) -> str:
    """64 hex digits, the same for every quantization of a model. Raises CapsuleError."""
    buffer = c.create_string_buffer(65)
    _check(-abs(_lib().llama_capsule_fingerprint(model, buffer, len(buffer))), "the model has no fingerprint")
    return buffer.value.decode("ascii")


def last_error() -> str:
    """The library's reason for the last failure in this thread, one line."""
    text = _lib().llama_capsule_last_error() or b""
    return " ".join(text.decode("utf-8", "replace").split())


def _check(value: int, what: str) -> int:
    if value < 0:
        raise CapsuleError(last_error() or what)
    return value


def _lib() -> Library:
    native = load()
    native.require_capsule()
    return native.llama
