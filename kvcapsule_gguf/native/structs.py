"""include/llama-capsule.h in ctypes."""

from __future__ import annotations

import ctypes as c


class CapsuleContextParams(c.Structure):
    """struct llama_capsule_context_params"""

    _fields_ = [
        ("size", c.c_size_t),
        ("capsule", c.c_void_p),
        ("n_hot", c.c_uint32),
        ("image_tokens", c.c_uint32),
        ("quality", c.c_float),
        ("ratio", c.c_float),
        ("auto_compress", c.c_bool),
    ]


MAX_TIERS = 16  # LLAMA_CAPSULE_MAX_TIERS


class CapsuleStatsStruct(c.Structure):
    """struct llama_capsule_stats"""

    _fields_ = [
        ("size", c.c_size_t),
        ("n_hot", c.c_uint32),
        ("n_hot_used", c.c_uint32),
        ("n_hot_vision", c.c_uint32),
        ("n_cold", c.c_uint32),
        ("bytes_slots", c.c_uint64),
        ("bytes_pools", c.c_uint64),
        ("bytes_scratch", c.c_uint64),
        ("bytes_hot", c.c_uint64),
        ("bytes_f16_token", c.c_uint64),
        ("n_tiers", c.c_uint32),
        ("n_slots_tier", c.c_uint32 * MAX_TIERS),
        ("n_cold_tier", c.c_uint32 * MAX_TIERS),
        ("bytes_tier", c.c_uint64 * MAX_TIERS),
        ("smaller", c.c_float * MAX_TIERS),
    ]


def bind(lib: c.CDLL, model_p: type, context_p: type, params: type) -> bool:
    """Declares the functions on `lib`; False if the library has no capsules."""
    if not hasattr(lib, "llama_capsule_load_from_file"):
        return False
    floats = c.POINTER(c.c_float)
    signatures = {
        "llama_capsule_load_from_file": (c.c_void_p, [model_p, c.c_char_p]),
        "llama_capsule_init_default": (c.c_void_p, [model_p]),
        "llama_capsule_free": (None, [c.c_void_p]),
        "llama_capsule_context_default_params": (CapsuleContextParams, []),
        "llama_capsule_init_from_model": (context_p, [model_p, params, CapsuleContextParams]),
        "llama_capsule_is_attached": (c.c_bool, [context_p]),
        "llama_capsule_compress": (c.c_int32, [context_p, c.c_int32, c.c_int32, c.c_int32]),
        "llama_capsule_get_stats": (c.c_int32, [context_p, c.POINTER(CapsuleStatsStruct)]),
        "llama_capsule_read_kv": (c.c_int32, [context_p, c.c_int32, c.c_int32, c.c_int32, c.c_int32, floats, floats, c.c_uint32]),
        "llama_capsule_layer_shape": (c.c_int32, [model_p, c.c_int32, c.POINTER(c.c_int32)]),
        "llama_capsule_fingerprint": (c.c_int32, [model_p, c.c_char_p, c.c_size_t]),
        "llama_capsule_last_error": (c.c_char_p, []),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    return True
