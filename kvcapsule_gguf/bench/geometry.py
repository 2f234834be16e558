"""Sizes of the models that are imitated. Speed depends on shapes, not on what weights and caches hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..format.capsule import GRID_ROPE_TYPES


@dataclass(frozen=True)
class Geometry:
    """Shapes of a language model, and of the images it is shown: `side` x `side` tokens."""

    name: str
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head: int
    n_embd: int
    n_ff: int
    n_vocab: int = 32000
    rope: str = "norm"
    sections: tuple[int, int, int, int] = (0, 0, 0, 0)
    bias: bool = False
    qk_norm: bool = False
    side: int = 24
    freq_base: float = 10000.0

    @property
    def image_tokens(self) -> int:
        return self.side**2

    @property
    def mrope(self) -> bool:
        return self.rope in GRID_ROPE_TYPES

    @property
    def image_positions(self) -> int:
        """By which an image moves the position of what follows."""
        return self.side if self.mrope else self.image_tokens

    @property
    def kv_bytes_f16(self) -> int:
        """K and V of one token, all layers."""
        return 2 * 2 * self.n_layer * self.n_head_kv * self.head

    def attention_only(self) -> Geometry:
        """One layer with the same heads and RoPE and next to nothing else, in an architecture that does not tie the heads to n_embd."""
        small = replace(self, name=self.name + "-attention", n_layer=1, n_embd=256, n_ff=256, n_vocab=64)
        return replace(small, arch="paddleocr", bias=False) if small.arch == "qwen2vl" else small


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llava-1.5-7b", "llama", 32, 32, 32, 128, 4096, 11008),
        Geometry("qwen2.5-vl-7b", "qwen2vl", 28, 28, 4, 128, 3584, 18944, rope="mrope", sections=(16, 24, 24, 0), bias=True, freq_base=1e6),
        Geometry("qwen3-vl-8b", "qwen3vl", 36, 32, 8, 128, 4096, 12288, rope="imrope", sections=(24, 20, 20, 0), qk_norm=True, freq_base=5e6),
    )
}
