"""Whether a projector can belong to a model, as far as both say it. llama.cpp compares nothing but the size of an embedding."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..format.gguf_header import GGUFError, read_header
from .errors import KVCapsuleError

# projector types whose models are sure to have, or not to have, positions of several dimensions (M-RoPE)
M_ROPE = {
    "mlp": False, "ldp": False, "ldpv2": False, "pixtral": False, "internvl": False, "idefics3": False, "gemma3": False, "llama4": False,
    "qwen2vl_merger": True, "qwen2.5vl_merger": True, "qwen3vl_merger": True, "qwen2.5o": True,
}  # fmt: skip


def check_projector(llama: ModuleType, model: int, mmproj: Path) -> None:
    """model: of llama.cpp. Raises KVCapsuleError for a projector of another family."""
    keys = ("clip.projector_type", "clip.vision.projector_type")
    try:
        values = read_header(mmproj, keys.__contains__).values
    except (GGUFError, OSError):
        return  # loading it says what is wrong
    kind = next((value.data for key in reversed(keys) if (value := values.get(key)) is not None and value.type == "str" and not value.array), None)
    has = llama.llama_model_rope_type(model) in (llama.LLAMA_ROPE_TYPE_MROPE, llama.LLAMA_ROPE_TYPE_IMROPE)
    if M_ROPE.get(kind, has) != has:
        raise KVCapsuleError(f"{mmproj.name} is the projector of another kind of model ({kind}): give the one that was made with this model")
