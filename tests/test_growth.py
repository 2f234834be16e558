"""Slots grow layer by layer; without memory for more, images stay in the hot cells, right and with one warning."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from llama_runner import Case, Step, buffers, clear, compress, image, limit_buffers, limit_memory, lossless_limit, nmse, seq_add, seq_rm, state_load, state_save, stats, text
from native_code import few_bytes

LAYERS = 8
GRID = (10, 16)
TOKENS = GRID[0] * GRID[1]
IMAGES = 4
MODEL = {"arch": "llama", "n_layer": LAYERS, "n_head": 2, "n_head_kv": 1, "head": 64, "n_ff": 64}
OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 1024, "n_ubatch": 16}  # a small compute buffer beside the slots


def album(*after: Step) -> list[Step]:
    """after: steps that follow each image."""
    return [text(4), *[s for i in range(IMAGES) for s in (image(GRID, seed=i), compress(), *after, text(3, seed=i))]]


def grown(seen: dict, start: dict) -> int:
    """Bytes of pools and scratch."""
    return sum(seen[name] - start[name] for name in ("bytes_pools", "bytes_scratch"))


def peak(sizes: list[int]) -> int:
    """The most bytes at a time. What is freed as soon as it was made only asked if there is memory."""
    kept = [size for i, size in enumerate(sizes) if size + (sizes[i + 1] if i + 1 < len(sizes) else 0) and size + (sizes[i - 1] if i else 0)]
    return int(np.cumsum(kept).max())


def probe(sizes: list[int]) -> int:
    """The most that was only asked for."""
    return max(a for a, b in pairwise(sizes) if a + b == 0)


def warnings(result) -> list[str]:
    return [line for step in result.steps for line in step.log if "no room for more capsule slots" in line]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, str]:
    return few_bytes(tmp_path_factory.mktemp("few_bytes"))


@pytest.fixture(scope="module")
def free(models, capsules, stock, patched, counted):
    """The album without a limit, on the stock library and with as many hot cells as the key says."""
    model = models(**MODEL)
    steps = [s for s in album() if s["op"] != "compress"]
    ours = patched([Case(str(hot), model, [stats(), buffers(), *album(stats(), buffers())], capsule=capsules(model), n_hot=hot, **OPTIONS) for hot in (256, 1024)], env=counted)
    return {"stock": stock([Case("a", model, steps, **OPTIONS)])["a"], 256: ours["256"], 1024: ours["1024"]}


def test_only_one_layer_exists_twice(free):
    """The second image makes the pools larger."""
    one, two = free[256].values("stats")[1:3]
    before, after = (seen["bytes_pools"] // LAYERS for seen in (one, two))
    assert before < after
    sizes = [size for size in free[256].values("buffers")[2] if size in (after, -before)]
    assert len(sizes) == 2 * LAYERS and peak(sizes) == LAYERS * (after - before) + before


def test_out_of_memory_leaves_images_hot(models, capsules, patched, free, counted):
    """At any point of the growth."""
    truth, ours = free["stock"], free[1024]
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(False, "f32")
    start, *_, last = ours.values("stats")
    needed, asked = 2 * grown(last, start), max(map(probe, ours.values("buffers")[1:]))
    limits = [*(needed * i // 6 for i in range(6)), *(asked + needed * i // 12 for i in range(13))]
    model = models(**MODEL)
    cases = [Case(str(limit), model, [stats(), limit_buffers(limit), *album(stats())], capsule=capsules(model), n_hot=1024, **OPTIONS) for limit in limits]
    seen = set()
    for result in patched(cases, env=counted).values():
        assert nmse(result.logits(), truth.logits()) <= lossless_limit(False, "f32")
        for i, s in enumerate(result.values("stats")[1:]):
            assert s["n_cold"] + s["n_hot_vision"] == (i + 1) * TOKENS and s["n_cold"] % 16 == 0
        assert len(warnings(result)) == (s["n_hot_vision"] > 0)
        seen.add(s["n_cold"])
    assert {0, IMAGES * TOKENS} < seen


def test_tried_again_when_hot_is_full(models, capsules, stock, patched, free, counted):
    """An image that found no slots is compressed once others were removed and the hot cells are needed."""
    model = models(**MODEL)
    steps = [text(4), image(GRID, seed=1), text(3), limit_buffers(0), image(GRID, seed=2), text(3), stats(), seq_rm(0, 4, 4 + TOKENS), limit_buffers(), text(160), stats(), text(5)]
    result = patched([Case("a", model, steps, capsule=capsules(model), n_hot=256, auto_compress=True, **OPTIONS)], env=counted)["a"]
    before, after = result.values("stats")
    assert before["n_cold"] + before["n_hot_vision"] == 2 * TOKENS and before["n_hot_vision"] > 0
    assert (after["n_cold"], after["n_hot_vision"]) == (TOKENS, 0)
    truth = stock([Case("a", model, [s for s in steps if s["op"] not in ("stats", "limit_buffers")], **OPTIONS)])["a"]
    assert nmse(result.logits(), truth.logits()) <= lossless_limit(False, "f32")


MIB = 1 << 20
LARGE = {"n_ctx": 16384, "n_batch": 1024, "n_ubatch": 1024, "n_hot": 4096, "auto_compress": True, "type_k": "f32", "type_v": "f32"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_the_system_has_no_memory_for_more(models, capsules, stock, patched):
    """Slots, scratch, scheduler or compute buffer: whatever is not there, the images stay hot and every answer is right."""
    model = models(arch="llama")
    album = [s for i in range(3) for s in (image((32, 32), seed=i), text(2, seed=i))]
    cases = [Case(str(mib), model, [text(3072), clear(), limit_memory(mib * MIB), *album, stats()], capsule=capsules(model), **LARGE)
             for mib in (24, 32, 40, 50, 64, 96, 160, 4096)]
    truth = stock([Case("a", model, [text(3072), clear(), *album], **LARGE | {"n_hot": 0, "auto_compress": False})])["a"].logits()[3072:]
    cold = []
    for case, result in zip(cases, patched(cases).values()):
        if result.error == "MemoryError" or result.error.startswith("Unable to allocate"):  # of Python and numpy, which share what is left
            continue
        assert nmse(result.logits()[3072:], truth) <= 1e-9, case.name  # of thousands of tokens
        seen = result.values("stats")[-1]
        assert seen["n_cold"] + seen["n_hot_vision"] == 3 * 1024
        assert len(warnings(result)) == (seen["n_hot_vision"] > 0)
        cold.append(seen["n_cold"])
    assert min(cold) < cold[-1] == 3 * 1024


@pytest.mark.parametrize("path", ["", "unpack"])
def test_growth_a_shift_and_a_save(models, capsules, patched, path):
    """The shift needs a graph of its own before the next decode has reserved the larger one."""
    model = models(arch="llama", head=256, n_head=2, n_head_kv=2, n_ff=64)
    steps = [text(4), image(2048), compress(), seq_add(0, 0, -1, 1), state_save("s"), text(3), state_load("s"), text(3)]
    case = Case("a", model, steps, capsule=capsules(model), n_ctx=8192, n_hot=2304, env={"LLAMA_KVCAPSULE_PATH": path})
    result = patched([case])["a"]
    assert result.values("moved") == [2048]
    before, after = result.logits(5), result.logits(7)
    assert nmse(after, before) <= 1e-6
