"""A tiny vision language model with random weights and a byte vocabulary, for tests of the chat: it says nonsense, but says it every time."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from make_capsule import random_capsule
from tiny_gguf import TinyModel, add_hparams, weights

IMAGE, PATCH = 56, 14  # 4 x 4 = 16 tokens
TOKENS = (IMAGE // PATCH) ** 2
CONTROL = ["<|im_start|>", "<|im_end|>"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *CONTROL]
TYPES = [2, 3, 3, *[6] * 256, *[3] * len(CONTROL)]

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(path: Path, *, arch: str = "llama", template: str | None = TEMPLATE, bos: int = 1, add_bos: bool = True, seed: int = 1) -> Path:
    model = TinyModel(arch=arch, n_vocab=len(PIECES), n_ctx_train=4096, seed=seed)
    w = gguf.GGUFWriter(path, model.arch)
    w.add_name(path.stem)
    add_hparams(w, model)
    w.add_vocab_size(model.n_vocab)
    w.add_tokenizer_model("llama")
    w.add_token_list(PIECES)
    w.add_token_scores([-float(i) for i in range(len(PIECES))])
    w.add_token_types(TYPES)
    w.add_bos_token_id(bos)
    w.add_eos_token_id(2)
    w.add_add_bos_token(add_bos)
    w.add_add_space_prefix(False)
    if template is not None:
        w.add_chat_template(template)
    tensors = weights(model)
    # answers in plain letters: control tokens and odd bytes are never the likeliest
    letters = [3 + b for b in range(ord("a"), ord("z") + 1)]
    unlikely = np.setdiff1d(np.arange(len(PIECES)), letters)
    tensors["output.weight"][unlikely] *= 1e-3
    for name, data in tensors.items():
        w.add_tensor(name, data)
    _close(w)
    return path


def write_mmproj(path: Path, *, arch: str = "llama", n_embd: int = 256, image: int = IMAGE, seed: int = 2) -> Path:
    """A CLIP tower of one layer with LLaVA's projector (fixed size) or, for qwen2vl, Qwen2-VL's (any size, 2 x 2 patches to a token)."""
    qwen = arch == "qwen2vl"
    rng = np.random.default_rng(seed)
    width, ff, heads = 32, 64, 2
    w = gguf.GGUFWriter(path, "clip")
    w.add_type("mmproj")
    w.add_name(path.stem)
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("qwen2vl_merger" if qwen else "mlp")
    w.add_vision_projection_dim(n_embd)
    w.add_vision_image_size(image)
    w.add_vision_patch_size(PATCH)
    w.add_vision_embedding_length(width)
    w.add_vision_feed_forward_length(ff)
    w.add_vision_block_count(1)
    w.add_vision_head_count(heads)
    w.add_vision_attention_layernorm_eps(1e-5)
    w.add_vision_image_mean([0.5] * 3)
    w.add_vision_image_std([0.5] * 3)
    w.add_vision_use_gelu(True)
    if not qwen:
        w.add_array("clip.vision.feature_layer", [1])

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    def linear(name: str, n_out: int, n_in: int) -> None:
        w.add_tensor(f"{name}.weight", matrix(n_out, n_in))
        w.add_tensor(f"{name}.bias", np.zeros(n_out, np.float32))

    w.add_tensor("v.patch_embd.weight", matrix(width, 3, PATCH, PATCH))
    if qwen:
        w.add_tensor("v.patch_embd.weight.1", matrix(width, 3, PATCH, PATCH))
    else:
        w.add_tensor("v.position_embd.weight", matrix((image // PATCH) ** 2, width))
    for name in ("v.post_ln", "v.blk.0.ln1", "v.blk.0.ln2", *(() if qwen else ("v.pre_ln",))):
        norm(name)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        linear(f"v.blk.0.{name}", width, width)
    linear("v.blk.0.ffn_up", ff, width)
    linear("v.blk.0.ffn_down", width, ff)
    merged = 4 * width if qwen else width
    linear("mm.0", n_embd, merged)
    linear("mm.2", n_embd, n_embd)
    _close(w)
    return path


def write_picture(path: Path, seed: int = 3, size: tuple[int, int] = (80, 60)) -> Path:
    from PIL import Image

    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def _close(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_folder(root: Path, archs: tuple[str, ...], template: str | None = TEMPLATE) -> Path:
    """A folder per architecture with tiny.gguf, its projector and a lossy capsule; beside them the pictures a.png, b.png and c.png."""
    for arch in archs:
        (root / arch).mkdir()
        model = write_model(root / arch / "tiny.gguf", arch=arch, template=template)
        write_mmproj(root / arch / "mmproj-tiny.gguf", arch=arch)
        random_capsule(model, root / arch / "kvcapsule-tiny.gguf", tiers=(4, 8))
    for name, seed in (("a.png", 3), ("b.png", 4), ("c.png", 5)):
        write_picture(root / name, seed=seed, size=(112, 112))
    return root
