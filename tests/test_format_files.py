"""Capsule files: what is written comes back, what is damaged is refused with one line, and the fingerprint binds to a model and not to a quantization."""

from __future__ import annotations

import ctypes
import hashlib
import re
from dataclasses import fields

import gguf
import numpy as np
import pytest
from conftest import library
from damages import ACCEPTED, DAMAGES, NEEDS_THE_MODEL, RETAIN_DAMAGES, STR
from hypothesis import HealthCheck, given, settings, strategies as st
from make_capsule import random_capsule
from tiny_gguf import TinyModel, rewrite, weights

from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.capsule import CapsuleError, Layer
from kvcapsule_gguf.format.fingerprint import fingerprint
from kvcapsule_gguf.format.gguf_header import TENSOR_TYPES
from kvcapsule_gguf.format.reader import has_capsule, read_capsule
from kvcapsule_gguf.format.schema import KEYS
from kvcapsule_gguf.format.tile_capsule import read_any_capsule
from kvcapsule_gguf.format.writer import write_capsule

RETAIN = {"key_codec": "retain", "mlp_width": 8}


@pytest.fixture(scope="module")
def model(models):
    return models(arch="llama")


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    return random_capsule(model, tmp_path_factory.mktemp("good") / "good.gguf", block_size=16)


@pytest.fixture(scope="module")
def retain(model, tmp_path_factory):
    return random_capsule(model, tmp_path_factory.mktemp("good") / "retain.gguf", block_size=16, **RETAIN)


# --- there and back ---


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen2vl", "qwen3vl"])
@pytest.mark.parametrize("options", [{}, {"lossless": False, "image_tokens": 64, "block_width": 8}, RETAIN], ids=str)
def test_a_file_comes_back(models, tmp_path, arch, options):
    first = read_capsule(random_capsule(models(arch=arch), tmp_path / "a.gguf", **options))
    again = read_capsule(write_capsule(tmp_path / "b.gguf", first))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (first.base, first.tiers, first.provenance) == (again.base, again.tiers, again.provenance)
    for x, y in zip(first.layers, again.layers, strict=True):
        for f in fields(Layer):
            assert np.array_equal(getattr(x, f.name), getattr(y, f.name)) or getattr(x, f.name) is getattr(y, f.name) is None
    assert not list(tmp_path.glob("*.part"))


def test_the_keys_and_types_of_the_format(good):
    """Through gguf-py, which shares no code with our reader; the expected types are those of docs/reference/format-v1.md."""
    found = gguf.GGUFReader(good).fields
    names = {"u32": "UINT32", "u16": "UINT16", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING"}
    for name, (kind, array) in KEYS.items():
        expected = [gguf.GGUFValueType[names[kind]]]
        assert list(found[name].types[:2]) == ([gguf.GGUFValueType.ARRAY] if array else []) + expected, name
    assert found["general.type"].contents() == "adapter" and found["adapter.type"].contents() == "kvcapsule"
    assert found["general.architecture"].contents() == found["kvcapsule.base.architecture"].contents() == "llama"


def test_the_tensors_of_the_format(retain):
    """ne of docs/reference/format-v1.md: N = 16, H = 2, d = 64, m = 8, K = 2, h = 8."""
    expected = {
        "k_mean": ("F32", [64, 2]), "v_mean": ("F32", [64, 2]), "k_basis": ("F32", [16, 16]), "v_basis": ("F32", [16, 16]),
        "k_query_weight": ("F32", [64, 2]), "k_gate": ("F16", [64, 2, 8, 2]), "k_neighbours": ("I32", [2, 8]),
        "k_mlp_up": ("F16", [128, 8, 2]), "k_mlp_up_bias": ("F32", [8, 2]), "k_mlp_down": ("F16", [8, 64, 2]),
    }
    found = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in gguf.GGUFReader(retain).tensors}
    assert found == {f"blk.{i}.kvcapsule.{k}": v for i in range(2) for k, v in expected.items()}


def test_ratio(model, tmp_path):
    """1 - bytes / bytes of f16, by hand: keys and values of 64, 16 rows: 4 q8_0 (68 bytes) and 12 q4_0 (36), against 16 of 128."""
    capsule = read_capsule(random_capsule(model, tmp_path / "a.gguf", lossless=False, faithful_rows=(0, 0, 4, 12, 0), rows=(0, 0, 0, 0, 8)))
    assert capsule.tiers[0].ratio == pytest.approx(1 - (4 * 68 + 12 * 36) / (16 * 128), abs=1e-6)
    assert capsule.tiers[1].ratio == pytest.approx(1 - 8 * 18 / (16 * 128), abs=1e-6)
    assert capsule.tier_for_ratio() == capsule.tier_for_ratio(0.0) == 1


def test_inside_an_mmproj(good, tmp_path):
    """The same keys and tensors in a file of another kind, among tensors of its own."""
    kv = {"general.type": ("mmproj", STR), "adapter.type": None, "general.architecture": ("clip", STR)}
    inside = rewrite(good, tmp_path / "mmproj.gguf", kv=kv, add=[("v.blk.0.weight", np.ones((3, 4), np.float32))])
    assert has_capsule(inside) and read_capsule(inside).base == read_capsule(good).base
    bad = rewrite(inside, tmp_path / "bad.gguf", add=[("blk.9.kvcapsule.k_mean", np.ones((3, 4), np.float32))])
    with pytest.raises(CapsuleError, match="unexpected tensor blk.9"):
        read_capsule(bad)


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
        read_any_capsule(path)
    line = str(e.value)
    assert len(line.splitlines()) == 1 and line.isprintable() and path.name in line
    return line


@pytest.mark.parametrize("name", [n for n in DAMAGES if n not in NEEDS_THE_MODEL])
def test_refused(good, tmp_path, name):
    damage, reason = DAMAGES[name]
    bad = tmp_path / "bad.gguf"
    damage(good, bad)
    assert re.search(reason, refusal(bad), re.IGNORECASE)


@pytest.mark.parametrize("name", RETAIN_DAMAGES)
def test_retain_refused(retain, tmp_path, name):
    damage, reason = RETAIN_DAMAGES[name]
    bad = tmp_path / "bad.gguf"
    damage(retain, bad)
    assert re.search(reason, refusal(bad))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(good, tmp_path, name):
    ACCEPTED[name](good, tmp_path / "strange.gguf")
    first, again = read_capsule(good), read_capsule(tmp_path / "strange.gguf")
    assert (first.base, first.tiers, first.block_size) == (again.base, again.tiers, again.block_size)
    assert all(np.array_equal(x.k_basis, y.k_basis) and x.rope == y.rope for x, y in zip(first.layers, again.layers, strict=True))


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
        read_capsule(bad)
    except CapsuleError as e:
        assert len(str(e).splitlines()) == 1


def test_missing_and_folder(tmp_path):
    assert "can not be read" in refusal(tmp_path / "none.gguf")
    with pytest.raises(CapsuleError):
        read_capsule(tmp_path)


def test_nothing_invalid_is_written(good, tmp_path):
    capsule = read_capsule(good)
    capsule.layers[0].k_basis[3, 3] = np.nan
    with pytest.raises(CapsuleError, match="k_basis"):
        write_capsule(tmp_path / "bad.gguf", capsule)
    assert not list(tmp_path.iterdir())


# --- fingerprint ---


def test_fingerprint_by_hand(models):
    """docs/reference/format-v1.md, from the weights the model was made of."""
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
