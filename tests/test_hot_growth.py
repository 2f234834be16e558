"""The hot cache grows when text, or an image that is being read, needs more cells: what is computed is what a cache with all cells from the start computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from llama_runner import Case, Result, Step, image, limit_buffers, lossless_limit, nmse, positions, seq_rm, set_pos, state_load, state_save, stats, text
from native_code import few_bytes

HOT, CTX = 256, 2048
GRID = (10, 16)
TOKENS = GRID[0] * GRID[1]
OURS_ONLY = ("stats", "compress")

CACHES = [("f16", False), ("f16", True), ("f32", False), ("q8_0", True), ("q4_0", True)]  # a quantized V needs flash attention
ARCHS = ["llama", "qwen2vl", "gemma3", "qwen35", "granitehybrid"]


def conversation() -> list[Step]:
    """Two images with text before, between and behind them, 256 hot cells several times over; some of it token by token, so that graphs are used again."""
    return [text(90), image(GRID, seed=1), stats(), text(130, seed=1), stats(), text(60, seed=2, one_by_one=True), stats(), image(GRID, seed=2), text(20, seed=3), stats(),
            text(300, seed=4), stats(), text(400, seed=5), stats(), text(5, seed=6, one_by_one=True)]


def ours(models, capsules, arch: str, name: str, steps: list[Step], **options) -> Case:
    model = models(arch=arch)
    return Case(name, model, steps, **({"n_ctx": CTX, "n_hot": HOT, "auto_compress": True, "capsule": capsules(model)} | options))


def plain(case: Case) -> Case:
    """The same for the stock library."""
    steps = [s if s["op"] not in OURS_ONLY else positions() for s in case.steps]
    names = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "flash_attn", "type_k", "type_v", "env")
    return Case(case.name, case.model, steps, **{name: getattr(case, name) for name in names})


def large(case: Case) -> Case:
    """The same with all cells from the start."""
    return replace(case, name=f"large {case.name}", n_hot=CTX)


@pytest.fixture(scope="module")
def conversations(models, capsules, stock, patched) -> dict[str, tuple[Result, Result, Result]]:
    cases = [ours(models, capsules, arch, f"{arch}-{kind}-{fa}", conversation(), type_k=kind, type_v=kind, flash_attn=fa) for arch in ARCHS for kind, fa in CACHES]
    truth, results = stock([plain(c) for c in cases]), patched([*cases, *map(large, cases)])
    return {c.name: (truth[c.name], results[f"large {c.name}"], results[c.name]) for c in cases}


@pytest.mark.parametrize(("kind", "fa"), CACHES)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_computed_stays(conversations, arch, kind, fa):
    truth, whole, result = conversations[f"{arch}-{kind}-{fa}"]
    assert np.array_equal(result.logits(), whole.logits())
    assert nmse(result.logits(), truth.logits()) <= (1e-3 if kind == "q4_0" else max(lossless_limit(fa, kind), 1e-8))
    seen = result.values("stats")
    # by half, or to what is needed, in steps of 256; an image that was compressed has given its cells back
    assert [x["n_hot"] for x in seen] == [256, 256, 512, 512, 768, 1280]
    assert [x["n_cold"] for x in seen] == [0, *[TOKENS] * 2, *[2 * TOKENS] * 3]
    assert [x["n_hot_used"] for x in seen] == [250, 220, 280, 300, 600, 1000]


def small(models, capsules, name: str, steps: list[Step], **options) -> Case:
    return ours(models, capsules, "llama", name, steps, **({"type_k": "f32", "type_v": "f32"} | options))


# --- states ---


@pytest.mark.parametrize("seq", [-1, 0])
@pytest.mark.parametrize("fa", [False, True])
def test_a_state_of_a_larger_cache(models, capsules, patched, fa, seq):
    """It makes the cache larger that reads it; where -c is too small for it, one line refuses it, and nothing of it stays."""
    begin = [text(90), image(GRID, seed=1), text(500, seed=1)]
    after = [positions(), stats(), text(9, seed=2), text(300, seed=3)]
    read = [state_load("s", seq, may_fail=True), *after]
    result = patched([small(models, capsules, name, steps, flash_attn=fa, **options) for name, steps, options in (
        ("saved", [*begin, state_save("s", seq), *after], {}),
        ("read", read, {}),
        ("read over text", [text(200, seed=9), *read], {}),
        ("beside another sequence", [text(200, seed=9, seq=1), *read], {"n_seq_max": 2}),
        ("too small", read[:4], {"n_ctx": 512}))])
    truth = result["saved"].logits()[-309:]
    assert result["saved"].values("stats")[0]["n_hot"] == 768
    for name in ("read", "read over text", "beside another sequence"):
        assert result[name].values("stats")[0]["n_hot"] > HOT
        assert nmse(result[name].logits()[-309:], truth) <= 1e-9
    assert result["read"].values("stats")[0]["n_hot_used"] == 590
    refused = result["too small"]
    assert refused.steps[0].rc == 1 and sum("error loading state" in line for line in refused.steps[0].log) == 1
    assert refused.values("positions") == [[-1, -1]] and refused.values("stats")[0]["n_hot_used"] == 0
    fresh = patched([small(models, capsules, "a", [text(9, seed=2)], flash_attn=fa, n_ctx=512)])["a"]
    assert nmse(refused.logits(3), fresh.logits()) <= 1e-9


# --- no memory ---


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, str]:
    return few_bytes(tmp_path_factory.mktemp("few_bytes"))


MANY_LAYERS = {"n_layer": 8, "n_head": 2, "n_head_kv": 1, "head": 64, "n_ff": 64}
MIB = 1 << 20


@pytest.mark.parametrize(("kind", "fa"), [("f32", False), ("q8_0", True)])
def test_no_memory_to_grow(models, capsules, patched, counted, fa, kind):
    """Wherever it ends, in a layer, in the scratch or in the graph, and also if there is none to make what has grown smaller again: the old cache stays, decode returns 1
    with one line, nothing is lost, and later it goes on."""
    model = models(arch="llama", **MANY_LAYERS)
    begin = [text(60), image(GRID, seed=1), text(30, seed=2), text(100, seed=3)]

    def case(limit: Step) -> Case:
        steps = [*begin, limit, text(200, seed=4, may_fail=True), limit_buffers(), stats(), text(5, seed=5), seq_rm(0, 190 + TOKENS), set_pos(0, 190 + TOKENS),
                 text(200, seed=4), text(90, seed=6), stats()]
        return Case(str(limit), model, steps, n_ctx=CTX, n_hot=HOT, n_ubatch=64, auto_compress=True, capsule=capsules(model), flash_attn=fa, type_k=kind, type_v=kind)

    layer = 512 * 2 * 64 * (4 if kind == "f32" else 1)
    limits = [*(limit_buffers(layer * i // 2) for i in range(10)), *(limit_buffers(MIB * i) for i in (8, 24, 40, 128)), *(limit_buffers(number=i) for i in range(11))]
    results = patched([case(limit) for limit in [limit_buffers(), *limits]], env=counted)
    truth = results[str(limit_buffers())]
    assert truth.values("stats")[0]["n_hot"] == 512
    failed, larger = 0, 0
    for limit in limits:
        result = results[str(limit)]
        assert not result.error, (limit, result.error)
        failure, (before, after) = result.steps[5].rc, result.values("stats")
        lines = [line for line in result.steps[5].log if "cache is full" in line]
        assert len(lines) == failure and all("there is no memory for more" in line for line in lines)
        assert (before["n_hot"], before["n_hot_used"], before["n_cold"]) == ((256, 190, TOKENS) if failure else (512, 390, TOKENS))
        for step in (*range(5), *(() if failure else (5,)), 11, 12):
            assert np.array_equal(*(r.steps[step].arrays.get("logits", np.zeros(0)) for r in (result, truth))), (limit, step)
        assert after == truth.values("stats")[1]
        failed += failure
        larger += failure and before["bytes_hot"] > 256 * 8 * 2 * 64 * (4 if kind == "f32" else 2)
    assert 10 < failed < len(limits) and larger
