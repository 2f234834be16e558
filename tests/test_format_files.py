"""Capsule files: what is damaged is refused with one line, and the fingerprint binds to a model and not to a quantization."""

from __future__ import annotations

import ctypes
import hashlib
import re

import numpy as np
import pytest
from conftest import library
from damages import ACCEPTED, DAMAGES, STR
from hypothesis import HealthCheck, given, settings, strategies as st
from make_capsule import MIXED, old_capsule, random_capsule
from tile_damages import NEEDS_THE_MODEL
from tiny_gguf import TinyModel, rewrite, weights

from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.fingerprint import fingerprint
from kvcapsule_gguf.format.gguf_header import TENSOR_TYPES
from kvcapsule_gguf.format.reader import has_capsule
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule


@pytest.fixture(scope="module")
def model(models):
    return models(arch="llama")


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    return random_capsule(model, tmp_path_factory.mktemp("good") / "good.gguf", tiers=(2, MIXED, 8))


@pytest.fixture(scope="module")
def retain(model, tmp_path_factory):
    return random_capsule(model, tmp_path_factory.mktemp("good") / "retain.gguf", tiers=(2, 8), codec="retain", mlp=8)


# --- what a file is ---


def test_inside_an_mmproj(good, tmp_path):
    """The same keys and tensors in a file of another kind, among tensors of its own."""
    kv = {"general.type": ("mmproj", STR), "adapter.type": None, "general.architecture": ("clip", STR)}
    inside = rewrite(good, tmp_path / "mmproj.gguf", kv=kv, add=[("v.blk.0.weight", np.ones((3, 4), np.float32))])
    assert has_capsule(inside) and read_tile_capsule(inside).base == read_tile_capsule(good).base
    bad = rewrite(inside, tmp_path / "bad.gguf", add=[("blk.9.kvcapsule.k_mean", np.ones((3, 4), np.float32))])
    with pytest.raises(CapsuleError, match="unexpected tensor blk.9"):
        read_tile_capsule(bad)


def test_has_capsule(good, model, tmp_path):
    assert has_capsule(good) and not has_capsule(model) and not has_capsule(tmp_path / "none") and not has_capsule(__file__)


def test_the_tensor_types_are_ggmls():
    """Against the library itself: names, block sizes and bytes; types that ggml has removed have blocks of 0."""
    (path,) = list(library("patched").glob("libggml-base.so")) or list(library("patched").glob("libggml-base.dylib")) or [None]
    if path is None:
        pytest.skip("no libggml-base to compare with")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_blck_size.restype, ggml.ggml_type_size.restype, ggml.ggml_type_name.restype = ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
    n = max(TENSOR_TYPES) + 1
    assert {i: (ggml.ggml_type_name(i).decode(), ggml.ggml_blck_size(i), ggml.ggml_type_size(i)) for i in range(n) if ggml.ggml_blck_size(i)} == TENSOR_TYPES


# --- refused ---

def refusal(path) -> str:
    with pytest.raises(CapsuleError) as e:
        read_tile_capsule(path)
    line = str(e.value)
    assert len(line.splitlines()) == 1 and line.isprintable() and path.name in line
    return line


@pytest.mark.parametrize("name", [n for n in DAMAGES if n not in NEEDS_THE_MODEL])
def test_refused(good, tmp_path, name):
    damage, reason = DAMAGES[name]
    bad = tmp_path / "bad.gguf"
    damage(good, bad)
    assert re.search(reason, refusal(bad), re.IGNORECASE)


def test_the_first_format_is_refused(tmp_path):
    assert refusal(old_capsule(tmp_path / "old.gguf")).endswith("a capsule of format v1: train it anew with kvcapsule-train")


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(good, tmp_path, name):
    ACCEPTED[name](good, tmp_path / "strange.gguf")
    first, again = read_tile_capsule(good), read_tile_capsule(tmp_path / "strange.gguf")
    assert (first.base, first.smaller) == (again.base, again.smaller)
    assert all(np.array_equal(x.k_table, y.k_table) and x.rope == y.rope for x, y in zip(first.layers, again.layers, strict=True))


def test_truncated_anywhere(retain, tmp_path):
    data = retain.read_bytes()
    bad = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    for n in {0, 1, 3, 4, 23, 24, *range(25, 4000, 37), *rng.integers(4000, len(data) - 40, 40).tolist(), len(data) - 33}:
        bad.write_bytes(data[:n])
        refusal(bad)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 1 << 30), value=st.integers(0, 255), width=st.integers(1, 8))
def test_noise_never_escapes(retain, tmp_path, where, value, width):
    """A damaged header is a CapsuleError or a valid capsule, never another exception."""
    data = bytearray(retain.read_bytes())
    where %= 6000
    data[where : where + width] = bytes([value]) * width
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    try:
        read_tile_capsule(bad)
    except CapsuleError as e:
        assert len(str(e).splitlines()) == 1


def test_missing_and_folder(tmp_path):
    assert "can not be read" in refusal(tmp_path / "none.gguf")
    with pytest.raises(CapsuleError):
        read_tile_capsule(tmp_path)


# --- fingerprint ---


def test_fingerprint_by_hand(models):
    """docs/reference/format-v2.md, from the weights the model was made of."""
    model = TinyModel(arch="qwen2")
    text = "kvcapsule-base-v1\narch=qwen2\nblock_count=2\nembedding_length=256\nhead_count_kv=2,2\nkey_length=64,64\nvalue_length=64,64\n"
    sha = hashlib.sha256(text.encode())
    for name, data in sorted(weights(model).items()):
        if name.endswith("norm.weight"):
            sha.update(f"{name}\n".encode() + data.astype("<f4").tobytes())
    assert fingerprint(models(model)) == sha.hexdigest()


def test_fingerprint_of_quantizations_and_other_models(models):
    prints = {t: fingerprint(models(dtype=t)) for t in ("f32", "f16", "q8_0")}
    assert len(set(prints.values())) == 1
    others = [fingerprint(models(**o)) for o in ({"seed": 2}, {"arch": "qwen2"}, {"head": 96}, {"n_layer": 3}, {"n_head_kv": 1})]
    assert len({*others, prints["f32"]}) == 6


def test_base_model(models):
    base = read_base_model(models(arch="qwen2vl", head=96))
    assert (base.architecture, base.rope_type, base.rope_sections, base.key_length) == ("qwen2vl", "mrope", (12, 18, 18, 0), [96, 96])
    assert read_base_model(models(arch="llama", freq_factors=True)).freq_factors[-1] == 8
    with pytest.raises(CapsuleError, match="^model '"):
        read_base_model(__file__)
