"""Reads named tensors of a running graph, through llama.cpp's evaluation callback."""

from __future__ import annotations

import ctypes
import re

import numpy as np

from ..native import Native


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor (ggml.h)."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


class TensorTap:
    """While `on`, keeps the f32 tensors whose name matches `pattern`; of tensors with the same name in one graph the last (queries: with RoPE)."""

    def __init__(self, native: Native, pattern: str) -> None:
        self.pattern = re.compile(pattern)
        self.on = False
        self.found: dict[str, np.ndarray] = {}
        self._base = native.ggml_base
        for name, result, args in (
            ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
            ("ggml_is_contiguous", ctypes.c_bool, [ctypes.c_void_p]),
            ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        ):
            function = getattr(self._base, name)
            function.restype, function.argtypes = result, args
        self.callback = native.llama.ggml_backend_sched_eval_callback(self._eval)

    def _eval(self, pointer: int, ask: bool, _user: int | None) -> bool:
        if not self.on:
            return not ask
        name = self._base.ggml_get_name(pointer).decode()
        wanted = self.pattern.fullmatch(name) is not None
        if ask:
            return wanted
        if wanted:
            tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
            if tensor.type == 0 and self._base.ggml_is_contiguous(pointer):
                data = np.empty(tuple(tensor.ne)[::-1], np.float32)
                self._base.ggml_backend_tensor_get(pointer, data.ctypes.data, 0, data.nbytes)
                self.found[name] = data
        return True

    def take(self) -> dict[str, np.ndarray]:
        """What was found since the last call: name -> f32, numpy's order of dimensions (4 of them)."""
        found, self.found = self.found, {}
        return found
