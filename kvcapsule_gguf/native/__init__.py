"""The patched llama.cpp from Python: `load()` first, then the capsule API of include/llama-capsule.h."""

from .capsule import Capsule, CapsuleError, CapsuleStats, compress, environment_capsule, fingerprint, is_attached, last_error, next_context, read_kv, stats
from .devices import Device, DeviceError, Devices
from .library import LLAMA_CPP_PYTHON, Native, NativeError, library_dir, load
from .shapes import LayerShape, layer_shapes

__all__ = [
    "LLAMA_CPP_PYTHON",
    "Capsule",
    "CapsuleError",
    "CapsuleStats",
    "Device",
    "DeviceError",
    "Devices",
    "LayerShape",
    "Native",
    "NativeError",
    "compress",
    "environment_capsule",
    "fingerprint",
    "is_attached",
    "last_error",
    "layer_shapes",
    "library_dir",
    "load",
    "next_context",
    "read_kv",
    "stats",
]
