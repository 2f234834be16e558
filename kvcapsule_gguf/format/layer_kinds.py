"""Which layers of a base model a capsule covers, and which rotate their keys, as llama.cpp decides it (src/models/*.cpp: load_arch_hparams)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SWA_PERIOD = {"gemma2": 2, "gemma3": 6, "llama4": 4}  # the last of so many layers has full attention, unless the file says otherwise
ATTENTION_PERIOD = {"qwen35": 4, "qwen35moe": 4, "qwen3next": 4}  # the last of so many layers is not recurrent
NO_ROPE_PERIOD = {"llama4": 4, "smollm3": 4}  # the last of so many layers does not rotate its keys
SWA_OFF = ("phi3",)  # llama.cpp does not use the window of these


def _get(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return values[key].data if key in values else default


def _window(values: Mapping[str, Any], arch: str) -> int:
    default = {"gemma2": 4096, "llama4": 8192}.get(arch, 0)
    return 0 if arch in SWA_OFF else int(_get(values, f"{arch}.attention.sliding_window", default))


def _is_last(i: int, period: int) -> bool:
    return period == 1 or (period > 0 and i % period == period - 1)


def _trunk(values: Mapping[str, Any], arch: str, n_layer: int) -> int:
    """Without the layers that only predict further tokens (MTP): a normal context has no cache for them."""
    return n_layer - int(_get(values, f"{arch}.nextn_predict_layers", 0))


def swa_layers(values: Mapping[str, Any], arch: str, n_layer: int) -> list[bool]:
    """Which layers have a sliding window."""
    pattern = _get(values, f"{arch}.attention.sliding_window_pattern")
    if not _window(values, arch):
        return [False] * n_layer
    if isinstance(pattern, (list, np.ndarray)):
        return [bool(x) for x in pattern][:n_layer]
    period = int(pattern) if pattern is not None else SWA_PERIOD.get(arch, 1)
    trunk = _trunk(values, arch, n_layer)
    return [i < trunk and not _is_last(i, period) for i in range(n_layer)]


def full_attention_layers(values: Mapping[str, Any], arch: str, head_count_kv: list[int], swa: list[bool]) -> list[int]:
    """Layers with KV heads and without a window, that are not recurrent and do not read the cache of another layer."""
    trunk = _trunk(values, arch, len(swa))
    last = trunk - int(_get(values, f"{arch}.attention.shared_kv_layers", 0))
    period = int(_get(values, f"{arch}.full_attention_interval", ATTENTION_PERIOD.get(arch, 1)))
    recurrent = _get(values, f"{arch}.attention.recurrent_layers")
    if recurrent is None:
        recurrent = [not _is_last(i, period) for i in range(trunk)]
    return [i for i in range(last) if head_count_kv[i] and not swa[i] and not recurrent[i]]


def is_rotated(values: Mapping[str, Any], arch: str, i: int) -> bool:
    """Whether layer i of a model with RoPE rotates its keys."""
    if arch in ("granite", "granitehybrid"):
        return bool(_get(values, f"{arch}.rope.scaling.finetuned", True))
    if arch == "llama4" and not _window(values, arch):
        return True
    period = NO_ROPE_PERIOD.get(arch)
    return period is None or not _is_last(i, period)
