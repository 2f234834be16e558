"""Tiny random-weight GGUF models that load and decode in llama.cpp, and an editor for GGUF files.

The scales are chosen so that attention is peaked and the context matters: what the model sees changes its logits a lot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROPE_KINDS = {"llama": "norm", "qwen2": "neox", "qwen2vl": "mrope", "qwen3vl": "imrope"}


@dataclass(frozen=True)
class TinyModel:
    """What a tiny model is made of; its `name` names its file."""

    arch: str = "llama"
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 64
    n_ff: int = 192
    n_vocab: int = 160
    n_ctx_train: int = 8192
    seed: int = 1
    dtype: str = "f32"  # f32, f16, q8_0 (the norms are always f32)
    freq_factors: bool = False  # llama only: a `rope_freqs.weight` tensor, as in Llama 3
    yarn: bool = False

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head

    @property
    def mrope(self) -> bool:
        return self.arch in ("qwen2vl", "qwen3vl")

    @property
    def sections(self) -> list[int]:
        """M-RoPE sections (t, y, x, z) in frequency pairs, in Qwen2-VL's proportions 2 : 3 : 3."""
        if not self.mrope:
            return [0, 0, 0, 0]
        t = self.head // 8
        y = (self.head // 2 - t) // 2
        return [t, y, self.head // 2 - t - y, 0]

    @property
    def name(self) -> str:
        flags = ("-ff" if self.freq_factors else "") + ("-yarn" if self.yarn else "")
        return f"tiny-{self.arch}-l{self.n_layer}-h{self.n_head}.{self.n_head_kv}x{self.head}{flags}-s{self.seed}-{self.dtype}"

    def but(self, **changes: Any) -> TinyModel:
        return replace(self, **changes)


def weights(model: TinyModel) -> dict[str, np.ndarray]:
    """The tensors of a tiny model in f32; the same for every `dtype`."""
    rng = np.random.default_rng(model.seed)
    e, kv = model.n_embd, model.n_head_kv * model.head

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * (gain / np.sqrt(n_in))).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    out = {"token_embd.weight": rng.standard_normal((model.n_vocab, e)).astype(np.float32)}
    for i in range(model.n_layer):
        p = f"blk.{i}."
        out[p + "attn_norm.weight"] = norm(e)
        out[p + "attn_q.weight"] = matrix(e, e, 1.4)
        out[p + "attn_k.weight"] = matrix(kv, e, 1.4)
        out[p + "attn_v.weight"] = matrix(kv, e, 1.5)
        out[p + "attn_output.weight"] = matrix(e, e, 1.5)
        if model.arch.startswith("qwen2"):
            for which, n in (("q", e), ("k", kv), ("v", kv)):
                out[p + f"attn_{which}.bias"] = (0.3 * rng.standard_normal(n)).astype(np.float32)
        if model.arch == "qwen3vl":
            out[p + "attn_q_norm.weight"] = 1.4 * norm(model.head)
            out[p + "attn_k_norm.weight"] = 1.4 * norm(model.head)
        out[p + "ffn_norm.weight"] = norm(e)
        out[p + "ffn_gate.weight"] = matrix(model.n_ff, e)
        out[p + "ffn_up.weight"] = matrix(model.n_ff, e)
        out[p + "ffn_down.weight"] = matrix(e, model.n_ff)
    out["output_norm.weight"] = norm(e)
    out["output.weight"] = matrix(model.n_vocab, e, 2.0)
    if model.freq_factors:
        out["rope_freqs.weight"] = np.linspace(1, 8, model.head // 2, dtype=np.float32)
    return out


def add_hparams(w: gguf.GGUFWriter, model: TinyModel) -> None:
    w.add_block_count(model.n_layer)
    w.add_context_length(model.n_ctx_train)
    w.add_embedding_length(model.n_embd)
    w.add_feed_forward_length(model.n_ff)
    w.add_head_count(model.n_head)
    w.add_head_count_kv(model.n_head_kv)
    w.add_key_length(model.head)
    w.add_value_length(model.head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(model.head)


def write(model: TinyModel, path: Path, edit: Callable[[dict[str, np.ndarray]], None] | None = None) -> Path:
    """Writes the model to `path`; `edit` may change its weights first."""
    tensors = weights(model)
    if edit is not None:
        edit(tensors)
    w = gguf.GGUFWriter(path, model.arch)
    w.add_name(model.name)
    add_hparams(w, model)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(model.n_vocab)
    w.add_tokenizer_model("no_vocab")
    if model.mrope:
        w.add_rope_dimension_sections(model.sections)
    if model.arch == "qwen3vl":
        w.add_num_deepstack_layers(0)
    if model.yarn:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(4.0)
        w.add_rope_scaling_orig_ctx_len(64)
    for name, data in tensors.items():
        if data.ndim == 1 or model.dtype == "f32":
            w.add_tensor(name, data)
        elif model.dtype == "f16":
            w.add_tensor(name, data.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[model.dtype.upper()]
            w.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


class ModelStore:
    """Makes each model once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: TinyModel | None = None, **changes: Any) -> Path:
        model = (model or TinyModel()).but(**changes)
        path = self.folder / f"{model.name}.gguf"
        return path if path.exists() else write(model, path)


def rewrite(
    source: Path,
    target: Path,
    *,
    kv: Mapping[str, tuple[Any, gguf.GGUFValueType] | None] = {},
    tensors: Mapping[str, Callable[[np.ndarray], np.ndarray] | None] = {},
    add: Iterable[tuple[str, np.ndarray]] = (),
) -> Path:
    """Copies a GGUF file with changes: `kv` sets a key to (value, type) or drops it, `tensors` maps a tensor or drops it."""
    r = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(target, "", endianess=r.endianess)
    w.kv_data[0].clear()
    missing = (set(kv) - set(r.fields) - {k for k, v in kv.items() if v}) | (set(tensors) - {t.name for t in r.tensors})
    assert not missing, f"{source} has no {missing}"
    for key, field in r.fields.items():
        if key.startswith("GGUF.") or key in kv:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        w.add_key_value(key, field.contents(), field.types[0], sub)
    for key, value in kv.items():
        if value is not None:
            data, kind = value
            many = isinstance(data, (list, tuple))
            w.add_key_value(key, list(data) if many else data, gguf.GGUFValueType.ARRAY if many else kind, kind if many else None)
    for t in r.tensors:
        change = tensors.get(t.name, lambda data: data)
        if change is not None:
            data = change(np.array(t.data))
            w.add_tensor(t.name, data, raw_dtype=None if data.dtype in (np.float32, np.float16, np.int32) else t.tensor_type)
    for name, data in add:
        w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return target
