"""llama_capsule_read_kv un-rotates exactly: its keys are the model's own keys before RoPE, for every RoPE kind, cache type and layout."""

from __future__ import annotations

import numpy as np
import pytest
from llama_runner import Case, Result, image, read_kv, seq_add, seq_rm, text
from tiny_gguf import TinyModel

HEADS_KV = 2
MODELS = {
    "norm": TinyModel("llama"),
    "norm-80": TinyModel("llama", head=80),
    "norm-factors": TinyModel("llama", freq_factors=True),
    "norm-yarn": TinyModel("llama", yarn=True),
    "neox": TinyModel("qwen2"),
    "neox-96": TinyModel("qwen2", head=96),
    "mrope": TinyModel("qwen2vl"),
    "mrope-80": TinyModel("qwen2vl", head=80),
    "imrope": TinyModel("qwen3vl"),
    "some-not": TinyModel("smollm3"),  # the last layer does not rotate its keys
    "window": TinyModel("gemma3"),  # of layers with a sliding window, every other, there is no cache to read
}
UNSUPPORTED = TinyModel("xverse")
GRID = [(kind, fa, k) for kind in MODELS for fa in (False, True) for k in ("f16", "q8_0") if not (k == "q8_0" and MODELS[kind].head % 32)]
# squared error over squared norm of a row: f16 rounds to 2^-11 of each value; q8_0 to 1/254 of the largest of 32
TOLERANCE = {"f16": 2.5e-7, "q8_0": 1e-4}
GRID_H, GRID_W = 6, 8  # of the image
REMOVED = slice(3, 8)  # of the text before it: the image fills the hole, so that its cells are not in the order of positions


def before_rope(result: Result, il: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys before RoPE, values), [token, head, d], of all tokens in the order of decoding, as the graph computed them."""
    keys, values = [], []
    for step in result.steps:
        mine = [(name, op, step.arrays[f"tensor{i}"]) for i, (name, op) in enumerate(step.values.get("tensors", [])) if name.endswith(f"-{il}")]
        rotated = any(op == "ROPE" for _, op, _ in mine)
        last = None
        for name, op, data in mine:
            data = data.reshape(-1, HEADS_KV, head)
            if name[0] == "V":
                if op == "RESHAPE":  # once for each ubatch
                    values.append(data)
                continue
            if op == "ROPE":  # what was seen last before it is what it rotates
                keys.append(last)
            elif op == "RESHAPE" and not rotated:
                keys.append(data)
            last = data
    return np.concatenate(keys), np.concatenate(values)


def row_error(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float((((a - b) ** 2).sum(-1) / (b**2).sum(-1)).max())


def case(models, kind: str, fa: bool, k: str, steps: list) -> Case:
    return Case(f"{kind}-{fa}-{k}", models(MODELS[kind]), steps, flash_attn=fa, type_k=k, type_v=k if fa else "f16", n_ubatch=20,
                dump=r"(Kcur|Kcur_normed|Vcur)-\d+")


@pytest.fixture(scope="module")
def read(models, patched):
    def steps(kind: str) -> list:
        mrope, covered = MODELS[kind].mrope, MODELS[kind].covered
        span = (12, 13) if mrope else (12, 12 + GRID_H * GRID_W)
        return [text(12), seq_rm(0, REMOVED.start, REMOVED.stop), image((GRID_H, GRID_W), seed=3), text(4, seed=1),
                *(read_kv(il) for il in covered), read_kv(covered[0], p0=span[0], p1=span[1]), read_kv(covered[0], n_max=7)]

    return patched([case(models, kind, fa, k, steps(kind)) for kind, fa, k in GRID])


def kept(x: np.ndarray) -> np.ndarray:
    return np.delete(x, np.arange(len(x))[REMOVED], axis=0)


@pytest.mark.parametrize(("kind", "fa", "type_k"), GRID)
def test_read_kv(read, kind, fa, type_k):
    result = read[f"{kind}-{fa}-{type_k}"]
    assert not result.error
    reads = [s for s in result.steps if "k" in s.arrays]
    n = 12 + GRID_H * GRID_W + 4 - (REMOVED.stop - REMOVED.start)
    for il, step in zip(MODELS[kind].covered, reads):
        keys, values = before_rope(result, il, MODELS[kind].head)
        assert len(step.arrays["k"]) == n
        assert row_error(step.arrays["k"], kept(keys)) <= TOLERANCE[type_k]
        assert row_error(step.arrays["v"], kept(values)) <= TOLERANCE[type_k if fa else "f16"]


@pytest.mark.parametrize(("kind", "fa", "type_k"), GRID)
def test_a_range_of_positions(read, kind, fa, type_k):
    result = read[f"{kind}-{fa}-{type_k}"]
    whole, part = (s.arrays["k"] for s in (result.steps[4], result.steps[4 + len(MODELS[kind].covered)]))
    start = 12 - (REMOVED.stop - REMOVED.start)
    assert np.array_equal(part, whole[start:start + GRID_H * GRID_W])


def test_too_small_a_buffer_is_an_error(read):
    step = read["norm-False-f16"].steps[-1]
    assert step.rc < 0 and "\n" not in step.values["last_error"] and step.values["last_error"]


def test_an_unsupported_architecture_is_refused(models, patched):
    step = patched([Case("a", models(UNSUPPORTED), [text(5), read_kv(0)])])["a"].steps[1]
    assert step.rc < 0 and step.values["last_error"] and "\n" not in step.values["last_error"]


# not in upstream's own shift: M-RoPE; yarn, whose magnitude it applies twice; layers without RoPE, which it rotates all the same;
# a quantized cache that is not rotated (head 96), where it crashes
SHIFTED = [(kind, fa, k) for kind, fa, k in GRID
           if not MODELS[kind].mrope and not MODELS[kind].yarn and kind != "some-not" and not (k == "q8_0" and MODELS[kind].head % 64)]


@pytest.fixture(scope="module")
def shifted(models, patched):
    steps = [text(30), seq_rm(0, 0, 9), seq_add(0, 9, -1, -9)]
    return patched([case(models, kind, fa, k, [*steps, *(read_kv(il) for il in MODELS[kind].covered)]) for kind, fa, k in SHIFTED])


@pytest.mark.parametrize(("kind", "fa", "type_k"), SHIFTED)
def test_after_a_shift(shifted, kind, fa, type_k):
    """llama_memory_seq_add changes positions at once and the keys only before the next decode: read_kv must not fall in between."""
    result = shifted[f"{kind}-{fa}-{type_k}"]
    assert not result.error
    for il, step in zip(MODELS[kind].covered, result.steps[3:]):
        keys, _ = before_rope(result, il, MODELS[kind].head)
        assert row_error(step.arrays["k"], keys[9:]) <= 3 * TOLERANCE[type_k]


@pytest.mark.parametrize("kind", MODELS)
def test_the_oracle(models, stock, kind):
    """What `before_rope` returns is what RoPE gets: the token at position 0 is not rotated (yarn scales it), those behind it keep their norm."""
    result = stock([case(models, kind, False, "f16", [text(6)])])[f"{kind}-False-f16"]
    keys, _ = before_rope(result, 0, MODELS[kind].head)
    after = [step.arrays[f"tensor{i}"] for step in result.steps for i, t in enumerate(step.values["tensors"]) if t == ["Kcur-0", "ROPE"]]
    after = np.concatenate(after).reshape(keys.shape)
    scale = np.linalg.norm(after[0]) / np.linalg.norm(keys[0])
    assert (scale > 1.1) == MODELS[kind].yarn
    assert np.allclose(after[0] / scale, keys[0], rtol=0, atol=1e-5)
    assert np.allclose(np.linalg.norm(after, axis=-1) / scale, np.linalg.norm(keys, axis=-1), rtol=1e-5)
    assert row_error(after[1:] / scale, keys[1:]) > 0.1
