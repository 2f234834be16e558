"""Names, types and shapes of format v1: one place for the writer and the reader."""

from __future__ import annotations

from .capsule import Capsule, Layer

MAX_FILE = 1 << 30
MAX_KV = 256
MAX_HEADER = 64 << 20
MAX_VALUE = 65504.0  # what the hot cache can hold
MAX_MEAN = 8192.0  # of a mean: what is added to it has to fit as well
MAX_HEADS = 4096
MAX_HEAD = 512
MAX_TIERS = 16
MAX_NEIGHBOURS = 8
MAX_MLP = 1024
MIN_BLOCK, MAX_BLOCK = 8, 256
INFIX = ".kvcapsule."

# key -> (type, is an array); all are required
KEYS = {
    "kvcapsule.version": ("u32", False),
    "kvcapsule.block_size": ("u32", False),
    "kvcapsule.block_shape": ("str", False),
    "kvcapsule.block_width": ("u32", False),
    "kvcapsule.image_tokens": ("u32", False),
    "kvcapsule.layers": ("u32", True),
    "kvcapsule.layer_rope": ("bool", True),
    "kvcapsule.base.architecture": ("str", False),
    "kvcapsule.base.block_count": ("u32", False),
    "kvcapsule.base.head_count_kv": ("u32", True),
    "kvcapsule.base.key_length": ("u32", True),
    "kvcapsule.base.value_length": ("u32", True),
    "kvcapsule.base.rope.type": ("str", False),
    "kvcapsule.base.rope.sections": ("u32", True),
    "kvcapsule.base.rope.freq_base": ("f32", True),
    "kvcapsule.base.fingerprint": ("str", False),
    "kvcapsule.mlp_width": ("u32", True),
    "kvcapsule.kept_count": ("u32", True),
    "kvcapsule.neighbour_count": ("u32", False),
    "kvcapsule.token_order": ("u16", True),
    "kvcapsule.tier.name": ("str", True),
    "kvcapsule.tier.ratio": ("f32", True),
    "kvcapsule.tier.key_codec": ("u32", True),
    "kvcapsule.tier.key_rows": ("u32", True),
    "kvcapsule.tier.value_rows": ("u32", True),
    "kvcapsule.tier.kappa": ("f32", True),
    "kvcapsule.default_ratio": ("f32", False),
}


def tensor_shapes(block_size: int, neighbours: int, heads: int, d_k: int, d_v: int, kept: int, mlp: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Short name -> (ggml type, numpy shape) of the tensors of a layer."""
    n, k = block_size, neighbours
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "k_mean": ("f32", (heads, d_k)),
        "v_mean": ("f32", (heads, d_v)),
        "k_basis": ("f32", (n, n)),
        "v_basis": ("f32", (n, n)),
        "k_query_weight": ("f32", (heads, d_k)),
    }
    if kept:
        out["k_gate"] = ("f16", (heads, n - kept, k, d_k))
        out["k_neighbours"] = ("i32", (n - kept, k))
    if mlp:
        out["k_mlp_up"] = ("f16", (heads, mlp, k * d_k))
        out["k_mlp_up_bias"] = ("f32", (heads, mlp))
        out["k_mlp_down"] = ("f16", (heads, d_k, mlp))
    return out


def layer_shapes(capsule: Capsule, layer: Layer) -> dict[str, tuple[str, tuple[int, ...]]]:
    return tensor_shapes(
        capsule.block_size, capsule.neighbour_count, layer.head_count_kv, layer.key_length, layer.value_length, layer.kept_count, layer.mlp_width
    )


def tensor_name(layer: int, short: str) -> str:
    return f"blk.{layer}{INFIX}{short}"
