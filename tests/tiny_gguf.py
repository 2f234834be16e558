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
from tiny_archs import ARCHS, FULL, RECURRENT, REFUSED, REUSED, SLIDING, Arch, Matrix, experts, per_layer_embeddings, recurrent

ROPE_KINDS = {"llama": "norm", "qwen2": "neox", "qwen2vl": "mrope", "qwen3vl": "imrope"}


@dataclass(frozen=True)
class TinyModel:
    """What a tiny model is made of; its `name` names its file."""

    arch: str = "llama"  # a name in tiny_archs.ARCHS or REFUSED
    n_layer: int = 0  # 0: one of each kind at least
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 64
    n_ff: int = 192
    n_vocab: int = 160
    n_ctx_train: int = 8192
    seed: int = 1
    dtype: str = "f32"  # f32, f16, q8_0 (the norms are always f32)
    freq_factors: bool = False  # a `rope_freqs.weight` tensor, as in Llama 3 (phi3: long and short factors)
    yarn: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_layer", self.n_layer or len(self.kind.layers))

    @property
    def kind(self) -> Arch:
        return (ARCHS | REFUSED)[self.arch]

    @property
    def llama_arch(self) -> str:
        """As llama.cpp calls it."""
        return self.arch.split("-")[0]

    @property
    def layers(self) -> list[str]:
        """The kind of each layer."""
        return [self.kind.layers[i % len(self.kind.layers)] for i in range(self.n_layer)]

    @property
    def kv_heads(self) -> list[int]:
        given = self.kind.kv_heads or (self.n_head_kv,)
        return [0 if self.has_no_heads(i) else given[i % len(given)] for i in range(self.n_layer)]

    def has_no_heads(self, i: int) -> bool:
        """In the file: qwen35 has the same number in recurrent layers."""
        return self.layers[i] == RECURRENT and self.arch != "qwen35"

    def head_of(self, i: int) -> int:
        return int(self.head * self.kind.swa_head) if self.layers[i] == SLIDING else self.head

    @property
    def n_rot(self) -> int:
        return int(self.head * self.kind.n_rot)

    @property
    def covered(self) -> list[int]:
        """The layers that a capsule covers."""
        return [i for i, k in enumerate(self.layers) if k == FULL]

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head

    @property
    def mrope(self) -> bool:
        return self.kind.rope in ("mrope", "imrope")

    @property
    def sections(self) -> list[int]:
        """M-RoPE sections (t, y, x, z) in frequency pairs, in Qwen2-VL's proportions 2 : 3 : 3."""
        if not self.mrope:
            return [0, 0, 0, 0]
        if self.kind.rope == "imrope":  # interleaved: in equal parts
            y = self.n_rot // 6
            return [self.n_rot // 2 - 2 * y, y, y, 0]
        t = self.n_rot // 8
        y = (self.n_rot // 2 - t) // 2
        return [t, y, self.n_rot // 2 - t - y, 0]

    @property
    def name(self) -> str:
        flags = ("-ff" if self.freq_factors else "") + ("-yarn" if self.yarn else "")
        return f"tiny-{self.arch}-l{self.n_layer}-h{self.n_head}.{self.n_head_kv}x{self.head}{flags}-s{self.seed}-{self.dtype}"

    def but(self, **changes: Any) -> TinyModel:
        return replace(self, **changes)


def weights(model: TinyModel) -> dict[str, np.ndarray]:
    """The tensors of a tiny model in f32; the same for every `dtype`."""
    rng = np.random.default_rng(model.seed)
    e, kind = model.n_embd, model.kind

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * (gain / np.sqrt(n_in))).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    scale = 1 / np.sqrt(e) if kind.scaled else 1
    out = {"token_embd.weight": (scale * rng.standard_normal((model.n_vocab, e))).astype(np.float32)}
    for i, layer in enumerate(model.layers):
        p = f"blk.{i}."
        out[p + "attn_norm.weight"] = norm(e)
        if layer == RECURRENT:
            out |= {p + k: v for k, v in recurrent(model.llama_arch, e, kind.keys, matrix, rng).items()}
        else:
            out |= {p + k: v for k, v in attention(model, i, matrix, norm, rng).items()}
        out[p + kind.names.get("ffn_norm", "ffn_norm") + ".weight"] = norm(e)
        if kind.experts:
            out |= {p + k: v for k, v in experts(kind.experts, e, kind.keys["expert_feed_forward_length"], matrix).items()}
        else:
            out[p + "ffn_gate.weight"] = matrix(model.n_ff, e)
            out[p + "ffn_up.weight"] = matrix(model.n_ff, e)
            out[p + "ffn_down.weight"] = matrix(e, model.n_ff)
        if kind.fused:
            out[p + "ffn_up.weight"] = np.concatenate([out.pop(p + "ffn_gate.weight"), out[p + "ffn_up.weight"]])
        if kind.post_norm:
            out[p + "post_attention_norm.weight"], out[p + "post_ffw_norm.weight"] = norm(e), norm(e)
    out[kind.names.get("output_norm", "output_norm") + ".weight"] = norm(e)
    if not kind.tied:
        out["output.weight"] = matrix(model.n_vocab, e, 2.0)
    factors = np.linspace(1, 8, model.n_rot // 2, dtype=np.float32)
    if model.llama_arch == "gemma4":
        out["rope_freqs.weight"] = factors
        width = kind.keys["embedding_length_per_layer_input"]
        out |= per_layer_embeddings(width, e, model.n_layer, model.n_vocab, matrix) if width else {}
    elif model.freq_factors and model.arch == "phi3":
        out |= {"rope_factors_long.weight": 2 * factors, "rope_factors_short.weight": factors}
    elif model.freq_factors:
        out["rope_freqs.weight"] = factors
    return out


def attention(model: TinyModel, i: int, matrix: Matrix, norm: Callable[[int], np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of an attention layer."""
    kind, e, d = model.kind, model.n_embd, model.head_of(i)
    q, kv = model.n_head * d, model.kv_heads[i] * d
    out = {"attn_q.weight": matrix(2 * q if kind.gate else q, e, 1.4)}
    if model.layers[i] != REUSED:
        out |= {"attn_k.weight": matrix(kv, e, 1.4), "attn_v.weight": matrix(kv, e, 1.5)}
    out["attn_output.weight"] = matrix(e, q, 1.5)
    if kind.bias:
        for which, n in (("q", q), ("k", kv), ("v", kv)):
            out[f"attn_{which}.bias"] = (0.3 * rng.standard_normal(n)).astype(np.float32)
    if kind.qk_norm:
        # gemma4 does not divide by the root of the head size
        gain = 1.4 if model.llama_arch != "gemma4" else 1.4 / d**0.25
        out["attn_q_norm.weight"] = gain * norm(d)
        if model.layers[i] != REUSED:
            out["attn_k_norm.weight"] = gain * norm(d)
    if kind.fused:
        out["attn_qkv.weight"] = np.concatenate([out.pop(f"attn_{x}.weight") for x in "qkv"])
    return out


def add_hparams(w: gguf.GGUFWriter, model: TinyModel) -> None:
    w.add_block_count(model.n_layer)
    w.add_context_length(model.n_ctx_train)
    w.add_embedding_length(model.n_embd)
    w.add_feed_forward_length(model.n_ff)
    w.add_head_count(model.n_head)
    w.add_head_count_kv(model.kv_heads[0] if len(set(model.kv_heads)) == 1 else model.kv_heads)
    w.add_key_length(model.head)
    w.add_value_length(model.head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(model.n_rot)
    if model.mrope:
        w.add_rope_dimension_sections(model.sections)
    keys = dict(model.kind.keys)
    if model.arch == "granitehybrid":
        keys["ssm.inner_size"] = 2 * model.n_embd
    if model.llama_arch == "gemma4":
        keys["attention.sliding_window_pattern"] = [x == SLIDING for x in model.layers]
        keys |= {f"{x}_swa": model.head_of(model.layers.index(SLIDING))
                 for x in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    for key, value in keys.items():
        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, list: w.add_array}[type(value)]
        add(f"{model.llama_arch}.{key}", value)


def write(model: TinyModel, path: Path, edit: Callable[[dict[str, np.ndarray]], None] | None = None) -> Path:
    """Writes the model to `path`; `edit` may change its weights first."""
    tensors = weights(model)
    if edit is not None:
        edit(tensors)
    w = gguf.GGUFWriter(path, model.llama_arch)
    w.add_name(model.name)
    add_hparams(w, model)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(model.n_vocab)
    w.add_tokenizer_model("no_vocab")
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
    _finish(w)
    return path


def write_lora(model: TinyModel, path: Path, rank: int = 2) -> Path:
    """A LoRA adapter of the keys and values of all attention layers."""
    rng = np.random.default_rng(7)
    w = gguf.GGUFWriter(path, model.llama_arch)
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", float(rank))
    for name, data in weights(model).items():
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            n_out, n_in = data.shape
            w.add_tensor(name + ".lora_a", (rng.standard_normal((rank, n_in)) / np.sqrt(n_in)).astype(np.float32))
            w.add_tensor(name + ".lora_b", (0.5 * rng.standard_normal((n_out, rank))).astype(np.float32))
    _finish(w)
    return path


def _finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class ModelStore:
    """Makes each model once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: TinyModel | None = None, **changes: Any) -> Path:
        model = model.but(**changes) if model else TinyModel(**changes)
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
    _finish(w)
    return target
