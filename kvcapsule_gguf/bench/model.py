"""A GGUF of a geometry, weights random bytes in Q4_0: it decodes as fast as a real one and says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from .geometry import Geometry

Q4_0 = gguf.GGMLQuantizationType.Q4_0
F32 = gguf.GGMLQuantizationType.F32


def tensors(g: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape), the contiguous dimension last; matrices are Q4_0, vectors F32."""
    q, kv = g.n_head * g.head, g.n_head_kv * g.head
    yield "token_embd.weight", (g.n_vocab, g.n_embd)
    for i in range(g.n_layer):
        p = f"blk.{i}."
        yield p + "attn_norm.weight", (g.n_embd,)
        for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            yield p + name + ".weight", (n, g.n_embd)
            if g.bias:
                yield p + name + ".bias", (n,)
        if g.qk_norm:
            yield p + "attn_q_norm.weight", (g.head,)
            yield p + "attn_k_norm.weight", (g.head,)
        yield p + "attn_output.weight", (g.n_embd, q)
        yield p + "ffn_norm.weight", (g.n_embd,)
        yield p + "ffn_gate.weight", (g.n_ff, g.n_embd)
        yield p + "ffn_up.weight", (g.n_ff, g.n_embd)
        yield p + "ffn_down.weight", (g.n_embd, g.n_ff)
    yield "output_norm.weight", (g.n_embd,)
    yield "output.weight", (g.n_vocab, g.n_embd)


def random_q4_0(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]; blocks of 32 values: an f16 scale and 16 bytes of codes."""
    rows, n = shape[0], shape[1] // 32
    blocks = rng.integers(0, 256, (rows, n, 18), dtype=np.uint8)
    # codes -8..7 have a standard deviation of 4.6: outputs of the size of the inputs
    blocks[..., :2] = np.array([1 / (4.6 * shape[1] ** 0.5)], np.float16).view(np.uint8)
    return blocks.reshape(rows, n * 18)


def write_model(g: Geometry, path: Path) -> Path:
    """Writes `path`, tensor by tensor; an unfinished file has another name."""
    part = path.with_suffix(".part")
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(part, g.arch)
    w.add_name(g.name)
    w.add_block_count(g.n_layer)
    w.add_context_length(131072)
    w.add_embedding_length(g.n_embd)
    w.add_feed_forward_length(g.n_ff)
    w.add_head_count(g.n_head)
    w.add_head_count_kv(g.n_head_kv)
    w.add_key_length(g.head)
    w.add_value_length(g.head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(g.head)
    w.add_rope_freq_base(g.freq_base)
    if g.mrope:
        w.add_rope_dimension_sections(g.sections)
    if g.arch == "qwen3vl":
        w.add_uint32("qwen3vl.n_deepstack_layers", 0)
    w.add_vocab_size(g.n_vocab)
    w.add_tokenizer_model("no_vocab")
    shapes = list(tensors(g))
    for name, shape in shapes:
        if len(shape) == 1:
            w.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // 32 * 18)
            w.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=Q4_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for _, shape in shapes:
        w.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else random_q4_0((shape[0], shape[1]), rng))
    w.close()
    part.replace(path)
    return path


def get_model(g: Geometry, folder: Path) -> Path:
    """Made once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"random-{g.name}-q4_0.gguf"
    return path if path.exists() else write_model(g, path)
