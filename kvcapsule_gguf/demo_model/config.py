"""Sizes of the demo models."""

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
class MergerConfig:
    """Qwen2-VL's ViT as llama.cpp runs it: any picture of whole 28 px cells, 2D RoPE, 2 x 2 patches merged to a token."""

    patch: int = 14
    merge: int = 2
    width: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 512
    hidden: int = 512  # of the merger
    rope_base: float = 10000.0
    eps: float = 1e-5

    @property
    def cell(self) -> int:
        """Side of the square that one token covers, in pixels."""
        return self.patch * self.merge


@dataclass(frozen=True)
class DecoderConfig:
    """Decoder as llama.cpp's `llama` arch runs it (RMSNorm, interleaved RoPE, SwiGLU, GQA).

    With `sections` and `bias` as its `qwen2vl` arch does; the pairs stay interleaved here, export.py reorders them.
    """

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
    sections: tuple[int, int, int, int] | None = None  # RoPE pairs that turn with t, y, x, nothing
    bias: bool = False  # of queries, keys and values


def mrope_decoder(vocab: int) -> DecoderConfig:
    """The second model's: t has the fastest pairs, y those of 13 to 112 cells, x those of 160 cells and more (and all that hardly turn)."""
    return DecoderConfig(vocab, sections=(2, 7, 23, 0), bias=True)
