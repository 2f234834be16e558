"""Graphs of ggml on the CPU backend, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i8": 24, "i32": 26}  # enum ggml_type


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@cache
def ggml(folder: Path | None = None) -> Any:
    """ggml's own library and that of its CPU backend, as one object."""
    from conftest import library

    folder = folder or library("patched")
    base, cpu = (ctypes.CDLL(str(next(iter(sorted(folder.glob(f"lib{name}.so")) + sorted(folder.glob(f"lib{name}.dylib"))))), ctypes.RTLD_GLOBAL)
                 for name in ("ggml-base", "ggml-cpu"))  # fmt: skip
    if not hasattr(base, "ggml_capsule_tile_attn"):
        raise RuntimeError(f"the ggml in {folder} has no GGML_OP_CAPSULE")
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParams]), ("ggml_free", None, [pointer]), ("ggml_get_data", pointer, [pointer]), ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_new_tensor_4d", pointer, [pointer, i32, i64, i64, i64, i64]), ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]), ("ggml_capsule_tile_attn", pointer, [pointer] * 12),
        ("ggml_capsule_tile_unpack", pointer, [pointer] * 3 + [ctypes.c_bool] + [pointer] * 4),
    ):  # fmt: skip
        getattr(base, name).restype, getattr(base, name).argtypes = result, arguments
    cpu.ggml_graph_compute_with_ctx.restype, cpu.ggml_graph_compute_with_ctx.argtypes = i32, [pointer, pointer, i32]
    base.compute = cpu.ggml_graph_compute_with_ctx
    return base


class Graph:
    """A ggml context with tensors filled from arrays."""

    def __init__(self, context: int):
        self.context = context

    def tensor(self, x: np.ndarray | None, type_: str, *ne: int) -> int | None:
        """ne: as ggml, the innermost first; x: its bytes."""
        if x is None:
            return None
        t = ggml().ggml_new_tensor_4d(self.context, TYPES[type_], *ne, *[1] * (4 - len(ne)))
        x = np.ascontiguousarray(x)
        assert ggml().ggml_nbytes(t) == x.nbytes, (ggml().ggml_nbytes(t), x.nbytes, ne)
        ctypes.memmove(ggml().ggml_get_data(t), x.ctypes.data, x.nbytes)
        return t

    def run(self, node: int, dtype: Any, threads: int = 1) -> np.ndarray:
        graph = ggml().ggml_new_graph(self.context)
        ggml().ggml_build_forward_expand(graph, node)
        assert ggml().compute(self.context, graph, threads) == 0
        n = ggml().ggml_nbytes(node)
        return np.frombuffer(ctypes.string_at(ggml().ggml_get_data(node), n), dtype).copy()


@contextmanager
def graph(mem_size: int = 1 << 26) -> Iterator[Graph]:
    context = ggml().ggml_init(InitParams(mem_size, None, False))
    try:
        yield Graph(context)
    finally:
        ggml().ggml_free(context)
