"""The time model behind --codec auto: its views are those that the library makes (test_capsule_project), its decisions those of docs/results/decode-cpu.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcapsule_gguf.bench.geometry import GEOMETRIES
from kvcapsule_gguf.codec.cut import BlockShape
from kvcapsule_gguf.format.base_model import BaseModel, read_base_model
from kvcapsule_gguf.train.speed import base_views, block_angles, choose_codec

TILE, LINE = BlockShape(64, 8), BlockShape(64)


@pytest.fixture
def model_of(models):
    def make(name: str, **other) -> BaseModel:
        g, tiny = GEOMETRIES[name], read_base_model(models(arch="llama"))
        n = tiny.block_count
        return replace(
            tiny, head_count=[g.n_head] * n, head_count_kv=[g.n_head_kv] * n, key_length=[g.head] * n, value_length=[g.head] * n, rope_type=g.rope,
            rope_sections=g.sections, rope_dimensions=g.head, freq_base=[g.freq_base] * n, **other,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(("name", "block", "views"), [("qwen2.5-vl-7b", TILE, 2), ("qwen3-vl-8b", TILE, 8), ("llava-1.5-7b", LINE, 22), ("llava-1.5-7b", TILE, 33)])
def test_views_of_known_models(model_of, name, block, views):
    assert base_views(block_angles(model_of(name), 0, block, 24)) == views


def test_a_line_of_unknown_width_is_a_line(model_of):
    model = model_of("llava-1.5-7b")
    assert (block_angles(model, 0, LINE, 24) == block_angles(model, 0, LINE, 0)).all()


@pytest.mark.parametrize(("name", "codec"), [("qwen2.5-vl-7b", "pca"), ("qwen3-vl-8b", "retain"), ("llava-1.5-7b", "retain")])
def test_choice(model_of, name, codec):
    chosen, why = choose_codec(model_of(name), TILE, 24)
    assert chosen == codec and why.startswith(f"--codec {codec}: ")


def test_without_rope_one_view_does(model_of):
    model = model_of("llava-1.5-7b", layer_rope=[False] * 64)
    assert choose_codec(model, TILE, 24)[0] == "pca"
