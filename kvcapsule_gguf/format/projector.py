"""Whether a projector can belong to a model, as far as both say it. llama.cpp compares nothing but the size of an embedding."""

from __future__ import annotations

from pathlib import Path

from ..native.library import Library
from ..runtime.errors import KVCapsuleError
from .gguf_header import GGUFError, read_header

TYPE_KEYS = ("clip.vision.projector_type", "clip.projector_type")
# projector types whose models are sure to have, or not to have, positions of several dimensions (M-RoPE)
M_ROPE = {
    "mlp": False, "ldp": False, "ldpv2": False, "pixtral": False, "internvl": False, "idefics3": False, "gemma3": False, "llama4": False,
    "qwen2vl_merger": True, "qwen2.5vl_merger": True, "qwen3vl_merger": True, "qwen2.5o": True,
}  # fmt: skip


def has_m_rope(llama: Library, model: int) -> bool:
    """Of a loaded model. llama: libllama (native.Library)."""
    return llama.llama_model_rope_type(model) in (llama.LLAMA_ROPE_TYPE_MROPE, llama.LLAMA_ROPE_TYPE_IMROPE)


def fixed_tokens(mmproj: Path) -> int:
    """Tokens of any picture, where a projector of LLaVA's kind gives all pictures the same number; 0: another kind, or it cannot be read."""
    keys = (*TYPE_KEYS, "clip.vision.image_size", "clip.vision.patch_size")
    try:
        values = read_header(mmproj, keys.__contains__).values
        kind = next((values[key].data for key in TYPE_KEYS if key in values), "mlp")
        image, patch = (int(values[key].data) for key in keys[2:])
        side, rest = divmod(image, patch)
    except (GGUFError, OSError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0
    return side * side if kind == "mlp" and not rest else 0


def check_projector(mmproj: Path, m_rope: bool) -> None:
    """m_rope: of the model. Raises KVCapsuleError for a projector of another family."""
    try:
        values = read_header(mmproj, TYPE_KEYS.__contains__).values
    except (GGUFError, OSError):
        return  # loading it says what is wrong
    kind = next((value.data for key in TYPE_KEYS if (value := values.get(key)) is not None and value.type == "str" and not value.array), None)
    if kind is not None and M_ROPE.get(kind, m_rope) != m_rope:
        raise KVCapsuleError(f"{mmproj.name} is the projector of another kind of model ({kind}): give the one that was made with this model")
