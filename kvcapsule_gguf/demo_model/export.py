"""GGUF files of the demo model, and back: decoder (`llama` arch) and mmproj (`clip` arch, LLaVA `mlp` projector)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from .talk import DemoModel
from .tokenizer import BOS, CHAT_TEMPLATE, EOS, UNKNOWN, Tokenizer

NAME = "kvdemo-8M-v1"
DESCRIPTION = "Small LLaVA-style model of drawn scenes (KVCapsule demo); knows nothing but those."

_BLOCK = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_DECODER = _BLOCK | {"o": "attn_output", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
_VISION = _BLOCK | {"o": "attn_out", "ln1": "ln1", "ln2": "ln2"}
_SINGLE = {
    "decoder.embed.weight": "token_embd.weight", "decoder.norm.weight": "output_norm.weight",
    "decoder.output.weight": "output.weight", "vision.position": "v.position_embd.weight",
    "vision.patch.weight": "v.patch_embd.weight", "vision.patch.bias": "v.patch_embd.bias",
    "vision.pre_ln.weight": "v.pre_ln.weight", "vision.pre_ln.bias": "v.pre_ln.bias",
    "vision.post_ln.weight": "v.post_ln.weight", "vision.post_ln.bias": "v.post_ln.bias",
    "vision.mm0.weight": "mm.0.weight", "vision.mm0.bias": "mm.0.bias",
    "vision.mm2.weight": "mm.2.weight", "vision.mm2.bias": "mm.2.bias",
}


def gguf_name(name: str) -> str:
    """GGUF name of a parameter of DemoModel."""
    if name in _SINGLE:
        return _SINGLE[name]
    part, _, layer, module, kind = name.split(".")
    table, prefix = (_DECODER, "") if part == "decoder" else (_VISION, "v.")
    return f"{prefix}blk.{layer}.{table[module]}.{kind}"


def _add_tensors(writer: gguf.GGUFWriter, model: DemoModel, part: str, matrix_type: type) -> None:
    for name, p in model.named_parameters():
        if name.startswith(part):
            array = p.detach().float().cpu().numpy()
            keep = array.ndim < 2 or name == "vision.position"
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array.astype(np.float32 if keep else matrix_type)))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_general(w: gguf.GGUFWriter, kind: str, full: bool) -> None:
    w.add_type(kind)
    w.add_name(NAME)
    w.add_basename("kvdemo")
    w.add_size_label("8M")
    w.add_version("v1")
    w.add_description(DESCRIPTION)
    w.add_license("MIT")
    w.add_file_type(gguf.LlamaFileType.ALL_F32 if full else gguf.LlamaFileType.MOSTLY_F16)


def export_decoder(model: DemoModel, path: Path, full: bool = False) -> None:
    """Write the decoder; matrices in F16, or F32 if `full`."""
    cfg, tokenizer = model.decoder.cfg, Tokenizer()
    w = gguf.GGUFWriter(path, "llama")
    _add_general(w, "model", full)
    w.add_vocab_size(cfg.vocab)
    w.add_context_length(cfg.context)
    w.add_embedding_length(cfg.width)
    w.add_block_count(cfg.layers)
    w.add_feed_forward_length(cfg.ffn)
    w.add_head_count(cfg.heads)
    w.add_head_count_kv(cfg.kv_heads)
    w.add_key_length(cfg.head_size)
    w.add_value_length(cfg.head_size)
    w.add_rope_dimension_count(cfg.head_size)
    w.add_rope_freq_base(cfg.rope_base)
    w.add_layer_norm_rms_eps(cfg.eps)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokenizer.pieces)
    w.add_token_scores(tokenizer.scores)
    w.add_token_types(tokenizer.types)
    w.add_unk_token_id(UNKNOWN)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)
    w.add_chat_template(CHAT_TEMPLATE)
    _add_tensors(w, model, "decoder", np.float32 if full else np.float16)
    _finish(w)


def export_vision(model: DemoModel, path: Path, full: bool = False) -> None:
    """Write ViT and projector; matrices in F16, or F32 if `full`."""
    cfg = model.vision.cfg
    w = gguf.GGUFWriter(path, "clip")
    _add_general(w, "mmproj", full)
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("mlp")
    w.add_vision_projection_dim(model.decoder.cfg.width)
    w.add_vision_image_size(cfg.image)
    w.add_vision_patch_size(cfg.patch)
    w.add_vision_embedding_length(cfg.width)
    w.add_vision_feed_forward_length(cfg.ffn)
    w.add_vision_block_count(cfg.layers)
    w.add_vision_head_count(cfg.heads)
    w.add_vision_attention_layernorm_eps(cfg.eps)
    w.add_vision_image_mean([0.5, 0.5, 0.5])
    w.add_vision_image_std([0.5, 0.5, 0.5])
    w.add_vision_use_gelu(True)
    # LLaVA reads the last layer but one unless told otherwise; ours reads the last.
    w.add_array("clip.vision.feature_layer", [cfg.layers])
    _add_tensors(w, model, "vision", np.float32 if full else np.float16)
    _finish(w)


def export(model: DemoModel, folder: Path, full: bool = False) -> tuple[Path, Path]:
    """Write both files into `folder`; returns model and mmproj path."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "F32" if full else "F16"
    paths = folder / f"{NAME}-{suffix}.gguf", folder / f"mmproj-{NAME}-{suffix}.gguf"
    export_decoder(model, paths[0], full)
    export_vision(model, paths[1], full)
    return paths


def init_from(model: DemoModel, *paths: Path) -> None:
    """Read weights back from GGUF files (any order; training heads stay as they are)."""
    tensors = {t.name: t for path in paths for t in gguf.GGUFReader(path).tensors}
    for name, p in model.named_parameters():
        tensor = tensors.get(gguf_name(name)) if not name.startswith("heads") else None
        if tensor is not None:
            p.data.copy_(torch.from_numpy(tensor.data.astype(np.float32)).reshape(p.shape))
