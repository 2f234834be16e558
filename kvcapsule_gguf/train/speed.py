"""What a codec of the keys costs when a CPU decodes, estimated from the measurements in docs/results/decode-cpu.md: what `--codec auto` decides by."""

from __future__ import annotations

import numpy as np

from ..codec.cut import BlockShape
from ..codec.rope import angles
from ..format.base_model import BaseModel
from ..format.capsule import GRID_ROPE_TYPES

ENERGY = 1e-5  # of the views of a query that are left out, as in llama-capsule-views.cpp


def base_views(angle: np.ndarray, still: int = 0) -> int:
    """angle f64 [N, pairs] by which RoPE turns the tokens of a block away from the first one, `still` pairs that are not turned
    -> how many views of a query stand for all N (docs/design/architecture.md, fused attention)."""
    turn = np.exp(1j * angle)
    values = np.linalg.eigvalsh((turn @ turn.conj().T).real + still)
    left = np.cumsum(values) <= ENERGY * len(angle) * (angle.shape[1] + still)
    return max(1, len(angle) - int(left.sum()))


def block_angles(model: BaseModel, layer: int, block: BlockShape, width: int) -> np.ndarray:
    """f64 [N, pairs]: of a block in pictures of `width` columns (0: not known, then a line)."""
    t = np.arange(block.size)
    columns = block.tile_width or width
    y, x = np.divmod(t, columns) if columns else (np.zeros_like(t), t)
    if model.rope_type in GRID_ROPE_TYPES:
        places = np.stack([np.zeros_like(t), y, x, np.zeros_like(t)], 1)
    else:
        places = y * (width or columns) + x
    return angles(places, model.rope_type, model.rope_dimensions, model.freq_base[layer], model.rope_sections, model.freq_factors)


def nanoseconds(codec: str, queries: int, views: int) -> float:
    """Attention of one token to a token and KV head of 128 values in blocks of 64, with AVX2 at 3.2 GHz: "pca", "retain" without a key MLP, or "" for f16 without a
    capsule and without flash attention; queries: heads that share a KV head."""
    if codec == "retain":
        return 12 + 11.5 * queries
    if codec == "pca":
        return min(10 + 6 * queries + 4.5 * queries * views, 182 + 8 * queries)  # keys not rebuilt, or rebuilt once for all
    return 25 + 20 * queries


def choose_codec(model: BaseModel, block: BlockShape, width: int) -> tuple[str, str]:
    """("pca" or "retain", one line that says why): pca, which loses less, where it decodes as fast as an f16 cache does."""
    layer = next((i for i in model.kv_layers if model.layer_rope[i]), None)
    if layer is None or model.rope_type == "none":
        views, layer = 1, model.kv_layers[0]
    else:
        views = base_views(block_angles(model, layer, block, width), (model.key_length[layer] - model.rope_dimensions) // 2)
    queries = model.head_count[layer] // model.head_count_kv[layer]
    stock = nanoseconds("", queries, views)
    faster = {codec: stock / nanoseconds(codec, queries, views) for codec in ("pca", "retain")}
    chosen = "pca" if faster["pca"] >= 1 else "retain"
    return chosen, (
        f"--codec {chosen}: on a CPU attention is about {faster['pca']:.1f} times as fast with pca, {faster['retain']:.1f} with retain, "
        f"as with an f16 cache without flash attention ({queries} query heads to a KV head, {views} views of a query)"
    )
