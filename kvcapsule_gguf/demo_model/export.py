"""GGUF files of the demo models, and back: decoder (`llama` or `qwen2vl` arch) and mmproj (`clip` arch, LLaVA's or Qwen2-VL's projector)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from .decoder import Decoder
from .mixed import MixedModel
from .talk import DemoModel
from .tokenizer import BOS, CHAT_TEMPLATE, EOS, UNKNOWN, VISION_TOKENS, Tokenizer


@dataclass(frozen=True)
class Release:
    """How the files of a model are called and described."""

    name: str
    basename: str
    description: str
    arch: str
    folder: Path
    around_image: tuple[str, ...] = ()

    def paths(self, folder: Path | None = None, suffix: str = "F16") -> tuple[Path, Path]:
        """Model and mmproj, where they are shipped unless told otherwise."""
        folder = folder or self.folder
        return folder / f"{self.name}-{suffix}.gguf", folder / f"mmproj-{self.name}-{suffix}.gguf"


DEMO = Path(__file__).parents[1] / "demo"
FIRST = Release("kvdemo-8M-v1", "kvdemo", "Small LLaVA-style model of drawn scenes (KVCapsule demo); knows nothing but those.", "llama", DEMO)
SECOND = Release("kvdemo-mrope-8M-v1", "kvdemo-mrope",
                 "Small Qwen2-VL-style model of drawn scenes of many sizes (KVCapsule demo); knows nothing but those.", "qwen2vl", DEMO / "mrope", VISION_TOKENS)
NAME = FIRST.name

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
    """GGUF name of a parameter of a demo model."""
    if name in _SINGLE:
        return _SINGLE[name]
    part, _, layer, module, kind = name.split(".")
    table, prefix = (_DECODER, "") if part == "decoder" else (_VISION, "v.")
    return f"{prefix}blk.{layer}.{table[module]}.{kind}"


def release_of(model: DemoModel | MixedModel) -> Release:
    """Which of the two it is."""
    return SECOND if model.decoder.cfg.sections else FIRST


def _mrope_turns(name: str, decoder: Decoder) -> bool:
    return decoder.cfg.sections is not None and name.startswith("decoder") and name.split(".")[-2] in ("q", "k")


def _split_pairs(name: str, p: Tensor, decoder: Decoder) -> Tensor:
    """Rows of queries and keys with the pairs (2i, 2i + 1) as (i, i + head_size / 2), which M-RoPE turns."""
    if not _mrope_turns(name, decoder):
        return p
    return p.unflatten(0, (-1, decoder.cfg.head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _join_pairs(name: str, p: Tensor, decoder: Decoder) -> Tensor:
    """The inverse of _split_pairs."""
    if not _mrope_turns(name, decoder):
        return p
    return p.unflatten(0, (-1, 2, decoder.cfg.head_size // 2)).transpose(1, 2).flatten(0, 2)


def _add_tensors(writer: gguf.GGUFWriter, model: nn.Module, part: str, matrix_type: type) -> None:
    for name, p in model.named_parameters():
        if name.startswith(part):
            array = _split_pairs(name, p.detach().float().cpu(), model.decoder).numpy()
            keep = array.ndim < 2 or name == "vision.position"
            array = np.ascontiguousarray(array.astype(np.float32 if keep else matrix_type))
            if name == "vision.patch.weight" and model.decoder.cfg.sections:  # of a picture twice, as of two frames, half each
                writer.add_tensor(f"{gguf_name(name)}.1", array / 2)
                array = array / 2
            writer.add_tensor(gguf_name(name), array)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_general(w: gguf.GGUFWriter, release: Release, kind: str, full: bool) -> None:
    w.add_type(kind)
    w.add_name(release.name)
    w.add_basename(release.basename)
    w.add_size_label("8M")
    w.add_version("v1")
    w.add_description(release.description)
    w.add_license("MIT")
    w.add_file_type(gguf.LlamaFileType.ALL_F32 if full else gguf.LlamaFileType.MOSTLY_F16)


def export_decoder(model: DemoModel | MixedModel, path: Path, full: bool = False) -> None:
    """Write the decoder; matrices in F16, or F32 if `full`."""
    cfg, release = model.decoder.cfg, release_of(model)
    tokenizer = Tokenizer(release.around_image)
    w = gguf.GGUFWriter(path, release.arch)
    _add_general(w, release, "model", full)
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
    if cfg.sections:
        w.add_rope_dimension_sections(list(cfg.sections))
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


def export_vision(model: DemoModel | MixedModel, path: Path, full: bool = False) -> None:
    """Write ViT and projector; matrices in F16, or F32 if `full`."""
    cfg, merges = model.vision.cfg, isinstance(model, MixedModel)
    w = gguf.GGUFWriter(path, "clip")
    _add_general(w, release_of(model), "mmproj", full)
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("qwen2vl_merger" if merges else "mlp")
    w.add_vision_projection_dim(model.decoder.cfg.width)
    w.add_vision_image_size(336 if merges else cfg.image)  # of no consequence where pictures keep their size
    w.add_vision_patch_size(cfg.patch)
    w.add_vision_embedding_length(cfg.width)
    w.add_vision_feed_forward_length(cfg.ffn)
    w.add_vision_block_count(cfg.layers)
    w.add_vision_head_count(cfg.heads)
    w.add_vision_attention_layernorm_eps(cfg.eps)
    w.add_vision_image_mean([0.5, 0.5, 0.5])
    w.add_vision_image_std([0.5, 0.5, 0.5])
    w.add_vision_use_gelu(True)
    if merges:
        w.add_vision_spatial_merge_size(cfg.merge)
    else:  # LLaVA reads the last layer but one unless told otherwise; ours reads the last.
        w.add_array("clip.vision.feature_layer", [cfg.layers])
    _add_tensors(w, model, "vision", np.float32 if full else np.float16)
    _finish(w)


def export(model: DemoModel | MixedModel, folder: Path | None = None, full: bool = False) -> tuple[Path, Path]:
    """Write both files into `folder`, or where they are shipped; returns model and mmproj path."""
    paths = release_of(model).paths(folder, "F32" if full else "F16")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    export_decoder(model, paths[0], full)
    export_vision(model, paths[1], full)
    return paths


def init_from(model: DemoModel | MixedModel, *paths: Path) -> None:
    """Read weights back from GGUF files (any order; training heads stay as they are)."""
    tensors = {t.name: torch.from_numpy(t.data.astype(np.float32)) for path in paths for t in gguf.GGUFReader(path).tensors}
    for name, p in model.named_parameters():
        tensor = tensors.get(gguf_name(name)) if not name.startswith("heads") else None
        if tensor is not None:
            second = tensors.get(f"{gguf_name(name)}.1")
            p.data.copy_(_join_pairs(name, tensor if second is None else tensor + second, model.decoder).reshape(p.shape))
