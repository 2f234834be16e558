"""The tensors of a layer whose tiles have another transform than the DCT (codec/transform.py): which there are, their shapes and rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..codec.channels import LANES
from ..codec.transform import Learned, N, Retain, gate_of_channels
from .schema import MAX_MLP, MAX_NEIGHBOURS
from .validate import need

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def transform_shapes(there: Mapping[str, tuple[int, ...]], name: str, heads: int, d_k: int, groups: int) -> Shapes:
    """there: short name -> ggml shape of the tensors that the layer has -> short name -> (ggml type, numpy shape) of those it must have.

    name: of the tensor `k_near`, for the messages. What is there and not named here does not belong to the file. Raises Invalid.
    """
    out: Shapes = {}
    if "k_near" in there:
        neighbours, dropped = there["k_near"][:2]
        need(dropped % 2 == 1 and dropped < N, f"tensor {name} is for {dropped} dropped tokens, not for an odd number below {N}")
        need(1 <= neighbours <= MAX_NEIGHBOURS, f"tensor {name} has {neighbours} neighbours, not 1..{MAX_NEIGHBOURS}")
        out = {"k_order": ("i8", (N,)), "k_near": ("i8", (dropped, neighbours)), "k_gate": ("f16", (heads, dropped, neighbours, LANES * groups))}
        if "k_mlp_bias" in there:
            h = there["k_mlp_bias"][0]
            need(1 <= h <= MAX_MLP, f"tensor {name.replace('k_near', 'k_mlp_bias')} has {h} hidden units, not 1..{MAX_MLP}")
            out |= {"k_mlp_up": ("f16", (heads, h, neighbours * d_k)), "k_mlp_bias": ("f32", (heads, h)), "k_mlp_down": ("f16", (heads, d_k, h))}
    elif "k_transform" in there:
        out["k_transform"] = ("f16", (N, N))
    if "v_transform" in there:
        out["v_transform"] = ("f16", (N, N))
    return out


def ggml_shape(array: np.ndarray) -> tuple[int, ...]:
    return array.shape[::-1] + (1,) * (4 - array.ndim)


def whole_of(there: Mapping[str, np.ndarray], kind: str, head: int, groups: Sequence[np.ndarray]) -> Learned | Retain | None:
    """there: short name -> tensors of a layer -> the transform of whole tiles of a head, None: the DCT."""
    if kind == "k" and "k_near" in there:
        mlp = [there[f"k_mlp_{name}"][head] for name in ("up", "bias", "down")] if "k_mlp_bias" in there else [np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0))]
        gate = gate_of_channels(there["k_gate"][head], groups)
        return Retain(there["k_order"].astype(int), there["k_near"].astype(int), gate, *(x.astype(np.float32) for x in mlp))
    matrix = there.get(f"{kind}_transform")
    return None if matrix is None else Learned(matrix.astype(np.float32))


def check_order(name: str, order: np.ndarray) -> None:
    """Raises Invalid."""
    need(np.array_equal(np.sort(order), np.arange(N)), f"tensor {name} is not an order of {N} tokens")


def check_near(name: str, near: np.ndarray) -> None:
    """Raises Invalid."""
    kept = N - len(near)
    need(bool(((near >= 0) & (near < kept)).all()), f"tensor {name} points outside the {kept} kept tokens")
