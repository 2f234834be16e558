"""The patched llama.cpp from Python: `load()` first, then the capsule API of include/llama-capsule.h."""

from .capsule import (
    Attachment,
    Capsule,
    CapsuleError,
    CapsuleStats,
    TierStats,
    attached,
    compress,
    environment_capsule,
    fingerprint,
    init_context,
    is_attached,
    last_error,
    read_kv,
    stats,
    why_no_context,
)
from .devices import Device, DeviceError, Devices
from .library import LLAMA_CPP_PYTHON, Native, NativeError, library_dir, llama_cpp, load
from .shapes import LayerShape, layer_shapes

__all__ = [
    "LLAMA_CPP_PYTHON",
    "Attachment",
    "Capsule",
    "CapsuleError",
    "CapsuleStats",
    "Device",
    "DeviceError",
    "Devices",
    "LayerShape",
    "Native",
    "NativeError",
    "TierStats",
    "attached",
    "compress",
    "environment_capsule",
    "fingerprint",
    "init_context",
    "is_attached",
    "last_error",
    "layer_shapes",
    "library_dir",
    "llama_cpp",
    "load",
    "read_kv",
    "stats",
    "why_no_context",
]
