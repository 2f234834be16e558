"""The hot cache is small, the context large: images fit because earlier ones were compressed, and memory stays flat."""

from __future__ import annotations

import pytest
from llama_runner import Case, clear, image, lossless_limit, nmse, rss, seq_rm, stats, text

HOT = 256
GRID = (10, 16)  # 160 tokens: one image fits in the hot cells, two do not
TOKENS = GRID[0] * GRID[1]
ARCHS = ("llama", "qwen2vl")
BOTH = [(arch, fa) for arch in ARCHS for fa in (False, True)]


def hot(models, capsules, arch: str, name: str, steps: list, **options) -> Case:
    model = models(arch=arch)
    capsule = capsules(model)
    return Case(name, model, steps, **({"n_ctx": 4096, "n_hot": HOT, "auto_compress": True, "capsule": capsule} | options))


def plain(case: Case) -> Case:
    """The same for the stock library, with all cells it needs."""
    steps = [s if s["op"] not in ("stats", "compress", "rss") else rss() for s in case.steps]
    return Case(case.name, case.model, steps, n_ctx=case.n_ctx, flash_attn=case.flash_attn, n_batch=case.n_batch, n_ubatch=case.n_ubatch)


# --- images fit because others were compressed ---

ALBUM = [text(8), *[s for i in range(8) for s in (image(GRID, seed=i), text(6, seed=i))], stats()]
BURST = [text(8), *[image(GRID, seed=i) for i in range(6)], text(6), stats()]  # no text between the images
SMALL_BATCHES = {"n_batch": 64, "n_ubatch": 32}


@pytest.fixture(scope="module")
def albums(models, capsules, stock, patched):
    cases = []
    for arch, fa in BOTH:
        cases += [
            hot(models, capsules, arch, f"album-{arch}-{fa}", ALBUM, flash_attn=fa),
            hot(models, capsules, arch, f"batches-{arch}-{fa}", ALBUM, flash_attn=fa, **SMALL_BATCHES),
            hot(models, capsules, arch, f"burst-{arch}-{fa}", BURST, image_tokens=TOKENS, flash_attn=fa),
        ]
    return stock([plain(c) for c in cases]), patched(cases)


@pytest.mark.parametrize(("arch", "fa"), BOTH)
@pytest.mark.parametrize("script", ["album", "batches", "burst"])
def test_many_images_in_a_small_hot_cache(albums, script, arch, fa):
    truth, ours = (r[f"{script}-{arch}-{fa}"] for r in albums)
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(fa)
    seen = ours.values("stats")[-1]
    images = sum(s["op"] == "image" for s in (BURST if script == "burst" else ALBUM))
    assert (seen["n_hot"], seen["n_cold"], seen["n_hot_vision"]) == (HOT, images * TOKENS, 0)


# --- nothing left to compress: the hot cache grows up to the context (tests/test_hot_growth.py) ---


def said(log: list[str]) -> list[str]:
    return [line for line in log if "cache is full" in line]


@pytest.mark.parametrize(("arch", "fa"), BOTH)
def test_full_of_text(models, capsules, stock, patched, arch, fa):
    """decode returns 1, one line says what fills the context, and the conversation goes on once there is room."""
    script = [text(450), text(70, seed=1, may_fail=True), text(9, seed=2), seq_rm(0, 0, 150), text(100, seed=3), clear(), text(5, seed=4)]
    result = patched([hot(models, capsules, arch, "a", script, flash_attn=fa, n_ctx=512)])["a"]
    assert not result.error
    assert [s.rc for s in result.steps] == [0, 1, 0, 0, 0, 0, 0]
    (line,) = said(result.steps[1].log)
    assert "512 cells of 512, of them 450 text" in line and "70 more do not fit: use a larger context (-c)" in line
    truth = stock([Case("a", models(arch=arch), [s for i, s in enumerate(script) if i != 1], flash_attn=fa, n_ctx=512)])["a"]
    assert nmse(result.logits(0, 2, 4, 6), truth.logits()) <= lossless_limit(fa)


@pytest.mark.parametrize("arch", ARCHS)
def test_cells_in_slots_count(models, capsules, patched, arch):
    """-c is the number of cells, hot and in slots: the hot cache does not grow beyond that."""
    script = [text(8), image(GRID, seed=1), text(80), text(512 - TOKENS - 87, may_fail=True), text(512 - TOKENS - 88)]
    result = patched([hot(models, capsules, arch, "a", script, n_ctx=512)])["a"]
    assert [s.rc for s in result.steps] == [0, 0, 0, 1, 0]
    assert len(said(result.steps[3].log)) == 1


def test_an_image_in_the_making(models, capsules, patched):
    """It is not compressed before all of it is there: the cache grows, or one line tells vision tokens from text."""
    script = [text(50), image((10, 20), seed=1), image((10, 20), seed=2, may_fail=True), stats(), text(5, may_fail=True), stats()]
    for n_ctx, codes, cold in ((512, [0, 0, 0, 0, 0, 0], 400), (256, [0, 0, 1, 0, 0, 0], 0)):
        result = patched([hot(models, capsules, "llama", "a", script, image_tokens=400, n_ctx=n_ctx)])["a"]
        assert [s.rc for s in result.steps] == codes
        before, after = result.values("stats")
        assert (before["n_cold"], after["n_cold"]) == (0, cold)
        for line in said(result.steps[2].log):
            assert "256 cells of 256, of them 50 text and 200 vision" in line
        assert len(said(result.steps[2].log)) == codes[2]


# --- a long loop ---

LOOP, KEEP, WORDS = 40, 3, 4


def loop(arch: str) -> list:
    """40 images one after the other; the fourth last one is removed each time."""
    span = max(GRID) if arch == "qwen2vl" else TOKENS
    start = [i * (span + WORDS) for i in range(LOOP)]
    steps = []
    for i in range(LOOP):
        if i >= KEEP:
            steps.append(seq_rm(0, start[i - KEEP], start[i - KEEP] + span))
        steps += [image(GRID, seed=i), text(WORDS, seed=i), stats(), rss()]
    return steps


@pytest.fixture(scope="module")
def loops(models, capsules, stock, patched):
    cases = [hot(models, capsules, arch, f"{arch}-{fa}", loop(arch), flash_attn=fa, n_ctx=8192, n_hot=512) for arch, fa in BOTH]
    return stock([plain(c) for c in cases]), patched(cases)


@pytest.mark.parametrize(("arch", "fa"), BOTH)
def test_forty_images(loops, arch, fa):
    truth, ours = (r[f"{arch}-{fa}"] for r in loops)
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(fa)
    seen = ours.values("stats")
    assert [s["n_cold"] for s in seen] == [min(i + 1, KEEP) * TOKENS for i in range(LOOP)]
    assert len({s["bytes_pools"] for s in seen[KEEP:]}) == 1
    memory = ours.values("rss")
    # memory is touched for the first time when image 25 takes the hot cells past a multiple of 256, not before and not after
    for stretch in (memory[10:25], memory[26:]):
        assert max(stretch) - stretch[0] <= 1 << 20
