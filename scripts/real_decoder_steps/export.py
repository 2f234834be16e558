"""The files that llama.cpp reads: the mmproj, the decoder in F16; and the small file of ours that is committed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from . import decoder, trunk

NAME = "smollm2-135m-dinov2-small"
ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "scripts" / "real_decoder_steps" / "trained.npz"


def save_trained(checkpoint: Path, out: Path = TRAINED) -> int:
    """The averaged values of a checkpoint, in f16. -> its step."""
    import torch

    state = torch.load(checkpoint, weights_only=False)
    np.savez(out, step=state["step"], **{k: v.numpy().astype(np.float16) for k, v in state["ema"].items()})
    return int(state["step"])


def load_trained(file: Path = TRAINED) -> dict[str, np.ndarray]:
    """f32 arrays by the names of training: mm0 [hidden, 384], mm0b, mm2 [576, hidden], mm2b, and lora.LAYER.{qkv,o}.{a,b}."""
    with np.load(file) as z:
        return {k: z[k].astype(np.float32) for k in z.files if k != "step"}


def mmproj(onnx_file: Path, p: dict[str, np.ndarray], out: Path, pixels: int = 224) -> None:
    """Projector type `mlp`, as for LLaVA.

    clip.cpp's graph for it puts the class token behind the patches, takes positions from the first row of the table on, and hands out rows 1 to n:
    patch 1 and so on, and last the class token. With the class token's row at the end of the table, the trunk computes what it was trained to;
    all that is lost is patch 0. This must change together with the pinned llama.cpp once clip.cpp puts the class token first.
    """
    w, grid = trunk.weights(onnx_file), pixels // trunk.PATCH
    f = gguf.GGUFWriter(out, "clip")
    f.add_type("mmproj")
    f.add_name(NAME)
    f.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    f.add_clip_has_vision_encoder(True)
    f.add_clip_projector_type("mlp")
    f.add_vision_projection_dim(len(p["mm2"]))
    f.add_vision_image_size(pixels)
    f.add_vision_patch_size(trunk.PATCH)
    f.add_vision_embedding_length(trunk.WIDTH)
    f.add_vision_feed_forward_length(4 * trunk.WIDTH)
    f.add_vision_block_count(trunk.LAYERS)
    f.add_vision_head_count(trunk.HEADS)
    f.add_vision_attention_layernorm_eps(trunk.EPS)
    f.add_vision_image_mean(trunk.MEAN)
    f.add_vision_image_std(trunk.STD)
    f.add_vision_use_gelu(True)
    f.add_array("clip.vision.feature_layer", [trunk.LAYERS])

    def f16(name: str, a: np.ndarray) -> None:
        f.add_tensor(f"{name}.weight", np.ascontiguousarray(a, np.float16))

    def f32(name: str, a: np.ndarray) -> None:
        f.add_tensor(name, np.ascontiguousarray(a, np.float32))

    f32("v.position_embd.weight", np.concatenate([trunk.positions(w, grid), w["pos_cls"].reshape(1, -1)]))
    f32("v.class_embd", w["embeddings.cls_token"].reshape(-1))
    f16("v.patch_embd", w["embeddings.patch_embeddings.projection.weight"])
    f32("v.patch_embd.bias", w["embeddings.patch_embeddings.projection.bias"])
    f32("v.post_ln.weight", w["layernorm.weight"])
    f32("v.post_ln.bias", w["layernorm.bias"])
    for i in range(trunk.LAYERS):
        theirs, ours = f"encoder.layer.{i}.", f"v.blk.{i}."
        for a, b in (("norm1", "ln1"), ("norm2", "ln2")):
            f32(f"{ours}{b}.weight", w[f"{theirs}{a}.weight"])
            f32(f"{ours}{b}.bias", w[f"{theirs}{a}.bias"])
        for a, b in (
            ("attention.attention.query", "attn_q"), ("attention.attention.key", "attn_k"), ("attention.attention.value", "attn_v"),
            ("attention.output.dense", "attn_out"), ("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down"),
        ):
            f16(f"{ours}{b}", w[f"{theirs}{a}.weight"])
            f32(f"{ours}{b}.bias", w[f"{theirs}{a}.bias"])
    for a in ("0", "2"):
        f16(f"mm.{a}", p[f"mm{a}"])
        f32(f"mm.{a}.bias", p[f"mm{a}b"])
    _write(f)


def language_model(source: Path, p: dict[str, np.ndarray], out: Path) -> None:
    """The decoder with its matrices in F16 (so that nothing quantizes activations) and the LoRA added in."""
    r = gguf.GGUFReader(source)
    f = gguf.GGUFWriter(out, "llama")
    for field in r.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        f.add_key_value(field.name, field.contents(), kind, **({"sub_type": field.types[-1]} if kind == gguf.GGUFValueType.ARRAY else {}))
    f.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for t in r.tensors:
        a = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        a = a + _learned(t.name, p)
        f.add_tensor(t.name, np.ascontiguousarray(a.astype(np.float32 if a.ndim < 2 else np.float16)))
    _write(f)


def _learned(tensor: str, p: dict[str, np.ndarray]) -> np.ndarray | float:
    """What the LoRA adds to a tensor of the GGUF."""
    part = tensor.removeprefix("blk.").removesuffix(".weight").split(".attn_")
    if len(part) != 2 or part[1] not in ("q", "k", "v", "output"):
        return 0.0
    name = "o" if part[1] == "output" else "qkv"
    a, b = p.get(f"lora.{part[0]}.{name}.a"), p.get(f"lora.{part[0]}.{name}.b")
    if a is None:
        return 0.0
    if name == "o":
        return b @ a
    start = {"q": 0, "k": decoder.Q, "v": decoder.Q + decoder.KV}[part[1]]
    rows = b[start:start + (decoder.Q if part[1] == "q" else decoder.KV)] @ a
    return rows if part[1] == "v" else decoder.pairs(rows)


def _write(f: gguf.GGUFWriter) -> None:
    f.write_header_to_file()
    f.write_kv_data_to_file()
    f.write_tensors_to_file()
    f.close()
