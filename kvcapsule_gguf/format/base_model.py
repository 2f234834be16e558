"""What a capsule has to know of its base model, read from the model's GGUF as llama.cpp does (llama-model.cpp: load_hparams, llama_model_rope_type)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import layer_kinds
from .capsule import CapsuleFileError
from .gguf_header import GGUFError, Header, read_header

# RoPE kinds of the architectures that vision models are built on; the pairs of `norm` are (2i, 2i+1), those of the others (i, i + n/2)
ROPE_OF_ARCH = {
    "norm": "llama llama4 deci baichuan starcoder internlm2 minicpm xverse command-r cohere2 olmo arctic deepseek deepseek2 deepseek2-ocr plm chatglm"
    " granite granitemoe granitehybrid chameleon bailingmoe smollm3 arcee ernie4_5 ernie4_5-moe mistral3 mistral4 nanbeige",
    "neox": "falcon grok dbrx stablelm bitnet qwen qwen2 qwen2moe qwen3 qwen3moe olmo2 olmoe phi2 phi3 phimoe gemma gemma2 gemma3 gemma3n gemma4"
    " starcoder2 openelm gptneox codeshell orion nemotron exaone exaone4 minicpm3 hunyuan-dense hunyuan-moe lfm2 lfm2moe gpt-oss seed_oss cogvlm dots1",
    "mrope": "qwen2vl paddleocr",
    "imrope": "qwen3vl qwen3vlmoe qwen35 qwen35moe",
    "none": "gpt2 mpt refact bloom t5 jais mamba mamba2",
}
ROPE_TYPE = {arch: kind for kind, archs in ROPE_OF_ARCH.items() for arch in archs.split()}
NORM_SUFFIX = "norm.weight"


@dataclass(frozen=True)
class BaseModel:
    """Lists are over all layers of the model."""

    path: Path
    architecture: str
    name: str
    block_count: int
    embedding_length: int
    head_count: list[int]
    head_count_kv: list[int]
    key_length: list[int]
    value_length: list[int]
    rope_type: str
    rope_sections: tuple[int, int, int, int]
    rope_dimensions: int
    freq_base: list[float]
    layer_rope: list[bool]  # whether the keys of a layer are rotated
    kv_layers: list[int]  # layers that a capsule covers: with a KV cache of their own, of full attention
    norms: dict[str, np.ndarray]  # every F32 tensor named *norm.weight
    freq_factors: np.ndarray | None  # f32 [rope_dimensions / 2]
    license: str = ""  # SPDX, or whatever the file says


def read_base_model(path: str | Path) -> BaseModel:
    """Raises CapsuleError if the file is not a language model that llama.cpp would load."""
    path = Path(path)
    try:
        header = read_header(path, lambda key: not key.startswith("tokenizer."))
        return _parse(path, header)
    except GGUFError as e:
        raise BaseModelError(path, str(e)) from None
    except OSError as e:
        raise BaseModelError(path, f"can not be read: {e.strerror or e}") from None


def licence_of(model: BaseModel) -> dict[str, str]:
    """For the provenance of a capsule that was made from the model."""
    return {"license": model.license} if model.license else {}


class BaseModelError(CapsuleFileError):
    """The base model can not be used; one line."""

    what = "model"


def _parse(path: Path, h: Header) -> BaseModel:
    def get(key: str, default: Any = None) -> Any:
        value = h.values.get(key)
        if value is None:
            if default is None:
                raise GGUFError(f"key {key} is missing")
            return default
        return value.data

    if int(get("split.count", 1)) > 1:
        raise GGUFError("a split model: join its files first (llama-gguf-split --merge)")
    arch = str(get("general.architecture"))
    if (h.values.get("general.type") and get("general.type") in ("mmproj", "adapter")) or arch == "clip":
        raise GGUFError("not a language model (an mmproj or an adapter)")
    n_layer = int(get(f"{arch}.block_count"))
    n_embd = int(get(f"{arch}.embedding_length"))
    if not 1 <= n_layer <= 4096 or not 1 <= n_embd <= 2**20:
        raise GGUFError(f"{arch}.block_count {n_layer} or embedding_length {n_embd} is not possible")

    def layers(key: str, default: Any = None) -> list[Any]:
        value = get(key, default)
        out = value.tolist() if isinstance(value, np.ndarray) else value if isinstance(value, list) else [value] * n_layer
        if len(out) < n_layer:
            raise GGUFError(f"key {key} has {len(out)} elements for {n_layer} layers")
        return out[:n_layer]

    heads = [int(n) for n in layers(f"{arch}.attention.head_count")]
    default_d = n_embd // heads[0] if heads[0] else 0
    d_k = int(get(f"{arch}.attention.key_length", default_d))
    d_v = int(get(f"{arch}.attention.value_length", default_d))
    swa = layer_kinds.swa_layers(h.values, arch, n_layer)
    d_k_swa, d_v_swa = (int(get(f"{arch}.attention.{x}_length_swa", d)) for x, d in (("key", d_k), ("value", d_v)))
    heads_kv = [int(n) for n in layers(f"{arch}.attention.head_count_kv", heads)]
    rope_type = ROPE_TYPE.get(arch, "")
    sections = [int(x) for x in _as_list(get(f"{arch}.rope.dimension_sections", [0, 0, 0, 0]))]
    return BaseModel(
        path=path,
        architecture=arch,
        name=str(get("general.name", path.stem)),
        block_count=n_layer,
        embedding_length=n_embd,
        head_count=heads,
        head_count_kv=heads_kv,
        key_length=[d_k_swa if s else d_k for s in swa],
        value_length=[d_v_swa if s else d_v for s in swa],
        rope_type=rope_type,
        rope_sections=tuple((sections + [0, 0, 0, 0])[:4]),  # type: ignore[arg-type]
        rope_dimensions=int(get(f"{arch}.rope.dimension_count", d_k)),
        freq_base=[float(get(f"{arch}.rope.freq_base", 10000.0))] * n_layer,
        layer_rope=[rope_type not in ("", "none") and layer_kinds.is_rotated(h.values, arch, i) for i in range(n_layer)],
        kv_layers=layer_kinds.full_attention_layers(h.values, arch, heads_kv, swa),
        norms={name: h.read(t) for name, t in h.tensors.items() if name.endswith(NORM_SUFFIX) and t.type_name == "f32"},
        freq_factors=h.read(h.tensors["rope_freqs.weight"]) if "rope_freqs.weight" in h.tensors else None,
        license=str(get("general.license", "")),
    )


def _as_list(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value)
