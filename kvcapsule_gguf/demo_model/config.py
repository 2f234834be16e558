"""Sizes of the demo model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-style ViT as llama.cpp's `clip` arch runs it (pre-LN, tanh GELU, no class embedding)."""

    image: int = 336
    patch: int = 14
    width: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 512
    eps: float = 1e-5

    @property
    def grid(self) -> int:
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class DecoderConfig:
    """Decoder as llama.cpp's `llama` arch runs it (RMSNorm, interleaved RoPE, SwiGLU, GQA)."""

    vocab: int
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    ffn: int = 704
    rope_base: float = 100000.0  # slower than LLaVA's: looking up by content over 600 positions is easier to learn
    eps: float = 1e-5
    context: int = 4096
