"""Every architecture that a capsule attaches to: the logits after compression are those of the unpatched library (see test_lossless.py).

capsule/model/resolve.cpp lists the architectures of ARCHS as supported, and no other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llama_runner import Case, Step, clear, compress, image, lossless_limit, nmse, positions, rounded_limit, seq_cp, seq_rm, state_load, state_save, stats, text, together
from tiny_archs import ARCHS
from tiny_gguf import TinyModel

# the single-token batches reuse their graph
CHAT = [text(7), image((8, 8), seed=1), compress(), text(3, seed=1), text(4, seed=2, one_by_one=True), image((4, 7), seed=2), compress(),
        text(3, seed=3, one_by_one=True), positions(), stats()]
SETTINGS = [(fa, k) for fa in (False, True) for k in ("f16", "q8_0")]
GRID = [(arch, fa, k, reuse) for arch in ARCHS for fa, k in SETTINGS for reuse in (True, False)]
GELU = [arch for arch in ARCHS if arch.startswith("gemma")]


UNPACK = {"LLAMA_KVCAPSULE_PATH": "unpack"}  # before the usual attention, which rounds as stock does


def limit(arch: str, fa: bool, type_k: str) -> float:
    return lossless_limit(fa, type_k)


def rounded(arch: str, fa: bool, type_k: str) -> float:
    """ggml's GELU is a table in f16, and every layer adds its rounding: stock itself differs by up to 2e-8 and, with q8_0 keys, 1e-6 from one order
    of its cells to another (test_stock_itself)."""
    if not fa and (arch in GELU or len(ARCHS[arch].layers) > 3):
        return {"f16": 5e-8, "q8_0": 2e-6}[type_k]
    return rounded_limit(fa, type_k)


def without_capsule(steps: list[Step]) -> list[Step]:
    return [positions() if s["op"] in ("compress", "stats") else s for s in steps]


def case(models, name: str, arch: str, steps: list[Step], fa: bool = False, type_k: str = "f16", **more: Any) -> Case:
    # V is quantized too where llama.cpp can: with flash attention
    return Case(name, models(arch=arch), steps, flash_attn=fa, type_k=type_k, type_v=type_k if fa else "f16", n_ctx=512,
                image_causal=ARCHS[arch].causal, **more)


@pytest.fixture(scope="module")
def truth(models, stock):
    return stock([case(models, f"{arch}-{fa}-{k}", arch, without_capsule(CHAT), fa, k) for arch in ARCHS for fa, k in SETTINGS])


@pytest.fixture(scope="module")
def ours(models, capsules, patched):
    return patched([case(models, f"{arch}-{fa}-{k}-{reuse}", arch, CHAT, fa, k, reuse=reuse, capsule=capsules(models(arch=arch)))
                    for arch, fa, k, reuse in GRID])


@pytest.mark.parametrize(("arch", "fa", "type_k", "reuse"), GRID)
def test_lossless(truth, ours, arch, fa, type_k, reuse):
    expected, result = truth[f"{arch}-{fa}-{type_k}"], ours[f"{arch}-{fa}-{type_k}-{reuse}"]
    assert nmse(result.logits(), expected.logits()) <= limit(arch, fa, type_k)
    assert result.values("moved") == [64, 28]
    assert result.values("positions") == expected.values("positions")[-2:-1]
    seen = result.values("stats")[-1]
    assert (seen["n_cold"], seen["n_hot_vision"], seen["n_hot_used"]) == (92, 0, 17)
    # 28 tokens without a grid are 3 lines of 8, and 4
    assert sum(seen["n_slots_tier"]) == 1 + (1 if TinyModel(arch=arch).mrope else 2)
    # some architectures never reuse a graph; a capsule costs one at each change of its slots
    assert (result.n_reused >= min(4, expected.n_reused)) if reuse else (result.n_reused == 0)


@pytest.fixture(scope="module")
def unpacked(models, capsules, patched):
    return patched([case(models, f"{arch}-{fa}-{k}", arch, CHAT, fa, k, capsule=capsules(models(arch=arch))) for arch in ARCHS for fa, k in SETTINGS],
                   env=UNPACK)


@pytest.mark.parametrize(("arch", "fa", "type_k"), [(arch, fa, k) for arch in ARCHS for fa, k in SETTINGS])
def test_lossless_before_the_usual_attention(truth, unpacked, arch, fa, type_k):
    name = f"{arch}-{fa}-{type_k}"
    assert nmse(unpacked[name].logits(), truth[name].logits()) <= rounded(arch, fa, type_k)


def test_the_mean(truth, unpacked):
    """Without flash attention and with an f16 cache, of the architectures without GELU; -s prints the largest error of each."""
    errors = {arch: {(fa, k): nmse(unpacked[f"{arch}-{fa}-{k}"].logits(), truth[f"{arch}-{fa}-{k}"].logits()) for fa, k in SETTINGS} for arch in ARCHS}
    for arch, found in errors.items():
        print(f"{arch:14s}", "  ".join(f"{'FA' if fa else 'no FA'} {k}: {x:.1e}" for (fa, k), x in found.items()))
    assert np.mean([found[False, "f16"] for arch, found in errors.items() if arch not in GELU]) <= 1e-9


@pytest.fixture(scope="module")
def damaged(models, capsules, patched):
    return patched([case(models, arch, arch, CHAT, capsule=capsules(models(arch=arch), tiers=(4,)), quality=1e9) for arch in ARCHS])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_wrong_capsule_is_seen(truth, damaged, arch):
    """All blocks have 4 bits: the covered layers matter in every one of these models."""
    assert nmse(damaged[arch].logits(), truth[f"{arch}-False-f16"].logits()) > 1e-5


def test_stock_itself(models, stock):
    """The unpatched library depends on the order of its cells: another sequence holds the first ones for a while."""
    steps = without_capsule(CHAT)
    moved = [text(33, seed=9, seq=1), *steps[:2], seq_rm(1, 0), *steps[2:]]
    settings = [(arch, k) for arch in ("gemma3", "gemma4") for k in ("f16", "q8_0")]
    runs = stock([case(models, f"{arch}-{k}-{i}", arch, s, type_k=k, n_seq_max=2) for arch, k in settings for i, s in enumerate((steps, moved))])
    for arch, k in settings:
        first, second = runs[f"{arch}-{k}-0"], runs[f"{arch}-{k}-1"]
        a, b = (np.concatenate([s.arrays["logits"] for s in steps if "logits" in s.arrays]) for steps in (first.steps, second.steps[1:]))
        assert 1e-12 < nmse(b, a) <= rounded(arch, False, k)


# --- RoPE with factors and YaRN ---

SCALED: dict[str, dict[str, Any]] = {
    f"{arch}-{'-'.join(how)}": {"arch": arch} | dict.fromkeys(how, True)
    for arch, *how in [
        ("phi3", "freq_factors"), ("phi3", "freq_factors", "yarn"),  # part of the head, magnitude 1.2; short and long factors
        ("granite", "freq_factors"), ("qwen2", "yarn"), ("mistral3", "yarn"), ("qwen2vl", "yarn"), ("qwen3vl", "yarn"), ("qwen35", "yarn"),
        ("gemma3", "yarn"),
    ]
}


@pytest.fixture(scope="module")
def scaled(models, capsules, stock, patched):
    def cases(steps: list[Step], **more: Any) -> list[Case]:
        return [Case(name, models(**options), steps, n_ctx=512, image_causal=ARCHS[options["arch"]].causal,
                     **{k: f(models(**options)) for k, f in more.items()}) for name, options in SCALED.items()]

    packed = cases(CHAT, capsule=capsules)
    return stock(cases(without_capsule(CHAT))), patched(packed), patched(packed, env=UNPACK)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rope(scaled, name):
    expected, attend, unpack = (runs[name] for runs in scaled)
    for result in (attend, unpack):
        assert nmse(result.logits(), expected.logits()) <= limit(SCALED[name]["arch"], False, "f16")


# --- sliding windows, state, automatic mode ---


def test_the_cache_of_the_window(models, capsules, patched):
    """It is small, which is said: the window and a batch are in it, however few cells the cache of the other layers begins with."""
    sizes = {"n_ctx": 2048, "n_hot": 256, "n_ubatch": 512}
    runs = patched([Case(arch, models(arch=arch), [stats()], capsule=capsules(models(arch=arch)), **sizes) for arch in ("llama", "gemma3")])
    line = "swa_full is off with a capsule"
    assert [sum(line in x for x in runs[arch].log) for arch in ("llama", "gemma3")] == [0, 1]
    assert [runs[arch].values("stats")[0]["n_hot"] for arch in ("llama", "gemma3")] == [256, 256]
    assert sum("creating     SWA KV cache, size = 768 cells" in x for x in runs["gemma3"].log) == 1


KINDS = ("llama", "gemma3", "gemma4-e", "llama4", "qwen35", "granitehybrid")  # of memory


def test_state(models, capsules, patched):
    """What follows a saved state is what followed it the first time, for the whole context and for a sequence."""
    ask = text(5, seed=2, one_by_one=True)
    steps = [text(5), image((4, 8), seed=1), compress(), text(3, seed=1)]
    again = {seq: [*steps, state_save("a", seq), ask, image((2, 8), seed=2), compress(), clear(), state_load("a", seq), ask, stats()] for seq in (-1, 0)}
    runs = patched([case(models, f"{arch}{seq}", arch, again[seq], capsule=capsules(models(arch=arch))) for arch in KINDS for seq in again])
    for name, result in runs.items():
        assert nmse(result.logits(10), result.logits(5)) <= 5e-8, name
        assert result.values("stats")[-1]["n_cold"] == 32


def test_automatic(models, capsules, stock, patched):
    steps = [s for s in CHAT if s["op"] != "compress"]
    expected = stock([case(models, arch, arch, without_capsule(steps)) for arch in KINDS])
    seen = patched([case(models, arch, arch, steps, capsule=capsules(models(arch=arch)), auto_compress=True) for arch in KINDS])
    for arch in KINDS:
        assert nmse(seen[arch].logits(), expected[arch].logits()) <= limit(arch, False, "f16")
        assert seen[arch].values("stats")[-1]["n_cold"] == 92


def test_a_small_hot_cache(models, capsules, stock, patched):
    """640 vision tokens go through 256 hot cells."""
    steps = [text(5), *(x for i in range(10) for x in (image((8, 8), seed=i), text(3, seed=i))), text(4, seed=20, one_by_one=True), stats()]
    archs = [arch for arch in KINDS if arch != "llama4"]  # its window is 8,192
    sizes = {"n_ubatch": 64, "n_batch": 64}
    expected = stock([replace(case(models, arch, arch, without_capsule(steps), **sizes), n_ctx=1024) for arch in archs])
    seen = patched([replace(case(models, arch, arch, steps, capsule=capsules(models(arch=arch)), auto_compress=True, n_hot=256, **sizes), n_ctx=1024)
                    for arch in archs])
    for arch in archs:
        assert nmse(seen[arch].logits(), expected[arch].logits()) <= limit(arch, False, "f16")
        end = seen[arch].values("stats")[-1]
        assert (end["n_hot"], end["n_hot_used"], end["n_cold"]) == (256, 39, 640)


# --- several sequences in one unified cache ---

SEQUENCES = [
    text(5, seq=0), image((4, 8), seed=1, seq=0), text(6, seed=1, seq=1), image((6, 8), seed=2, seq=1), compress(0), compress(1),
    text(3, seed=2, seq=0), text(2, seed=3, seq=1), seq_cp(0, 2), together({0: 11, 1: 12, 2: 13}), together({0: 14, 2: 15}), image((2, 8), seed=3, seq=2),
    compress(2), together({0: 16, 1: 17, 2: 18}), stats(),
]
IN_ONE_CACHE = ("llama", "qwen2vl", "gemma3", "qwen35", "lfm2")


def test_several_sequences(models, capsules, stock, patched):
    common = {"n_seq_max": 3, "kv_unified": True}
    expected = stock([case(models, arch, arch, without_capsule(SEQUENCES), **common) for arch in IN_ONE_CACHE])
    seen = patched([case(models, arch, arch, SEQUENCES, capsule=capsules(models(arch=arch)), **common) for arch in IN_ONE_CACHE])
    for arch in IN_ONE_CACHE:
        assert nmse(seen[arch].logits(), expected[arch].logits()) <= limit(arch, False, "f16")
        assert seen[arch].values("stats")[-1]["n_cold"] == 32 + 48 + 16


# --- LoRA and control vectors ---


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """Cases with a LoRA of the keys and values, and with a control vector, per architecture."""
    from tiny_gguf import write_lora

    folder = tmp_path_factory.mktemp("adapters")
    out = {}
    for arch in ("llama", "qwen2vl", "gemma3"):
        lora = write_lora(TinyModel(arch), folder / f"{arch}.gguf")
        out |= {f"{arch}-lora": {"lora": lora}, f"{arch}-cvec": {"cvec": 0.3}, f"{arch}-none": {}}
    return out


def test_adapters(models, capsules, stock, patched, adapted):
    """They change K and V of the image; they are there before it."""

    def arch(name: str) -> str:
        return name.split("-")[0]

    expected = stock([case(models, name, arch(name), without_capsule(CHAT), **extra) for name, extra in adapted.items()])
    seen = patched([case(models, name, arch(name), CHAT, capsule=capsules(models(arch=arch(name))), **extra)
                    for name, extra in adapted.items()])
    for name in adapted:
        assert nmse(seen[name].logits(), expected[name].logits()) <= limit(arch(name), False, "f16")
        if not name.endswith("none"):
            assert nmse(expected[name].logits(), expected[arch(name) + "-none"].logits()) > 1e-3
