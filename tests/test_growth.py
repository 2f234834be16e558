"""Slots grow layer by layer; without memory for more, images stay in the hot cells, right and with one warning."""

from __future__ import annotations

import sys

import pytest
from llama_runner import Case, Step, clear, compress, image, limit_memory, lossless_limit, nmse, seq_add, seq_rm, state_load, state_save, stats, text

LAYERS = 8
GRID = (10, 16)
TOKENS = GRID[0] * GRID[1]
IMAGES = 4
MODEL = {"arch": "llama", "n_layer": LAYERS, "n_head": 2, "n_head_kv": 1, "head": 64, "n_ff": 64}
OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 1024, "n_ubatch": 16}  # a small compute buffer beside the slots


def album() -> list[Step]:
    return [stats(), text(4), *[s for i in range(IMAGES) for s in (image(GRID, seed=i), compress(), text(3, seed=i), stats())]]


def limited(name: str, model, capsule, limit: float, steps: list[Step], **options) -> Case:
    return Case(name, model, steps, capsule=capsule, env={"LLAMA_KVCAPSULE_LIMIT": str(int(limit))}, **(OPTIONS | options))


def grown(seen: dict, start: dict) -> tuple[int, int]:
    """Bytes of the pools, and of the scratch without its constants."""
    return seen["bytes_pools"], seen["bytes_scratch"] - start["bytes_scratch"]


def compute(result) -> list[float]:
    """What the compute buffer has grown by, in bytes, at each stats(): by the log, so with a little to spare."""
    found, sizes = result.log, []
    for step in result.steps:
        found = found + step.log
        if "stats" in step.values:
            mib = [float(line.split("=")[1].split()[0]) for line in found if "compute buffer size =" in line]
            sizes.append((mib[-1] - mib[0] + 0.02) * 2**20)
    return sizes


def warnings(result) -> list[str]:
    return [line for step in result.steps for line in step.log if "no room for more capsule slots" in line]


@pytest.fixture(scope="module")
def free(models, capsules, stock, patched):
    """The album without a limit, on the stock library and with as many hot cells as the key says."""
    model = models(**MODEL)
    steps = [s for s in album() if s["op"] not in ("compress", "stats")]
    ours = patched([Case(str(hot), model, album(), capsule=capsules(model), n_hot=hot, **OPTIONS) for hot in (256, 1024)])
    return {"stock": stock([Case("a", model, steps, **OPTIONS)])["a"], 256: ours["256"], 1024: ours["1024"]}


def test_only_one_layer_exists_twice(models, capsules, patched, free):
    start, *seen = free[256].values("stats")
    (pools1, scratch1), (pools2, scratch2) = (grown(s, start) for s in seen[:2])
    _, compute1, compute2, *_ = compute(free[256])
    limit = pools2 + max(pools2 / LAYERS, scratch2) + scratch1 + compute1
    limit = max(limit, pools2 + scratch2 + compute2)
    assert limit < pools1 + pools2 + scratch1 + compute1, "this would be enough for all layers at once"
    model = models(**MODEL)
    result = patched([limited("a", model, capsules(model), limit, album()[:10], n_hot=256)])["a"]
    assert [s["n_cold"] for s in result.values("stats")[1:]] == [TOKENS, 2 * TOKENS]
    assert not warnings(result)


def test_out_of_memory_leaves_images_hot(models, capsules, patched, free):
    """At any point of the growth."""
    truth, ours = free["stock"], free[1024]
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(False, "f32")
    last = ours.values("stats")[-1]
    needed = last["bytes_pools"] + last["bytes_scratch"] + compute(ours)[-1]
    model = models(**MODEL)
    capsule = capsules(model)
    cases = [limited(str(i), model, capsule, 1 + 1.6 * needed * i / 16, album(), n_hot=1024) for i in range(17)]
    seen = set()
    for result in patched(cases).values():
        assert nmse(result.logits(), truth.logits()) <= lossless_limit(False, "f32")
        for i, s in enumerate(result.values("stats")[1:]):
            assert s["n_cold"] + s["n_hot_vision"] == (i + 1) * TOKENS and s["n_cold"] % 16 == 0
        assert len(warnings(result)) == (s["n_hot_vision"] > 0)
        seen.add(s["n_cold"])
    assert {0, IMAGES * TOKENS} < seen


def test_tried_again_when_hot_is_full(models, capsules, stock, patched, free):
    """An image that found no slots is compressed once others were removed and the hot cells are needed."""
    start, first = free[256].values("stats")[:2]
    limit = sum(grown(first, start)) + compute(free[256])[1]
    model = models(**MODEL)
    steps = [text(4), image(GRID, seed=1), text(3), image(GRID, seed=2), text(3), stats(), seq_rm(0, 4, 4 + TOKENS), text(160), stats(), text(5)]
    options = {"n_hot": 256, "auto_compress": True}
    result = patched([limited("a", model, capsules(model), limit, steps, **options)])["a"]
    before, after = result.values("stats")
    assert before["n_cold"] + before["n_hot_vision"] == 2 * TOKENS and before["n_hot_vision"] > 0
    assert (after["n_cold"], after["n_hot_vision"]) == (TOKENS, 0)
    truth = stock([Case("a", model, [s for s in steps if s["op"] != "stats"], **OPTIONS)])["a"]
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
