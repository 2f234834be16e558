"""Memory is what the tables say, and the process really is smaller."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from llama_runner import Case, breakdown, compress, image, rss, stats, text
from make_capsule import MIXED
from native_code import shared_library
from tiny_gguf import TinyModel


def head_bytes(table, d: int) -> int:
    """Of a slot of 8 x 8 tokens: docs/reference/format-v2.md in a loop. table: bits, [33 blocks of rows][groups of 32 channels]."""
    scales = codes = 0
    for g in range(-(-d // 32)):
        channels = min(32, d - 32 * g)
        for block in range(33):
            rows, bits = (1 if block in (0, 32) else 2), int(table[block][g])
            scales += 2 * (0 < bits < 16)
            codes += -(-rows * channels * bits // 8)
    return -(-scales // 8) * 8 + -(-codes // 8) * 8


def slot_bytes(path: Path, tier: int) -> int:
    """Of all layers, in units of 64 bytes; each head has 8 bytes of its own."""
    tables = {t.name: t.data for t in gguf.GGUFReader(path).tensors if t.name.endswith("_table")}
    total = 0
    for i in range(len(tables) // 2):
        k, v = (tables[f"blk.{i}.kvcapsule.{x}_table"][tier] for x in "kv")
        d = 32 * k.shape[-1]
        total += -(-sum(8 + head_bytes(a, d) + head_bytes(b, d) for a, b in zip(k, v)) // 64) * 64
    return total


SMALL = [TinyModel("llama"), TinyModel("qwen2", head=96), TinyModel("qwen2vl", head=128)]


@pytest.mark.parametrize("model", SMALL, ids=lambda m: f"{m.arch}-{m.head}")
@pytest.mark.parametrize("bits", [MIXED, 3, 8], ids=str)
def test_bytes_are_those_of_the_tables(models, capsules, patched, model, bits):
    capsule = capsules(models(model), tiers=(bits,))
    case = Case("a", models(model), [text(4), image((8, 8)), compress(), image((8, 8), seed=1), compress(), stats()], n_ctx=2048, n_hot=512, capsule=capsule, quality=1e9)
    seen = patched([case])["a"].values("stats")[0]
    f16_token = model.n_layer * model.n_head_kv * 2 * model.head * 2
    assert seen["bytes_f16_token"] == f16_token
    assert seen["bytes_hot"] == 512 * f16_token
    assert (seen["n_tiers"], seen["n_slots_tier"][0], seen["n_cold_tier"][0]) == (1, 2, 128)
    assert seen["bytes_tier"][0] == seen["bytes_slots"] == 2 * slot_bytes(capsule, 0)
    assert seen["smaller"][0] == pytest.approx(64 * f16_token / slot_bytes(capsule, 0), rel=0.02)
    assert seen["bytes_slots"] <= seen["bytes_pools"]


@pytest.fixture(scope="module")
def account(tmp_path_factory) -> str:
    """tests/native/memory_breakdown.cpp as a library."""
    return str(shared_library("memory_breakdown", tmp_path_factory.mktemp("native")))


def test_the_breakdown_counts_slots(models, capsules, patched, account):
    """llama.cpp's account of a context, which llama-server prints, holds the slots: it grows by what the pools grow."""
    steps = [text(4), image((8, 8)), stats(), breakdown(account), compress(), stats(), breakdown(account)]
    for i in range(12):
        steps += [image((12, 16), seed=i), compress()]
    seen = patched([Case("a", models(SMALL[0]), [*steps, stats(), breakdown(account)], n_ctx=4096, n_hot=512, capsule=capsules(models(SMALL[0])))])["a"]
    for kept, told in zip(seen.values("stats"), seen.values("breakdown")):
        counted = kept["bytes_hot"] + kept["bytes_pools"] + kept["bytes_scratch"]
        assert counted <= told <= counted + 2**18  # tables in the scratch, rounding of buffers
    first, _, last = seen.values("stats")
    assert last["bytes_pools"] - first["bytes_pools"] > 2**19


# large enough that what the C library keeps for itself (up to 10 MB, not the same every time) is a small share
BIG = TinyModel("llama", n_layer=16, n_head=8, n_head_kv=8, head=128, n_ff=128)
IMAGES, IMAGE = 16, (16, 16)


def test_the_process_is_smaller(models, capsules, stock, patched):
    """16 images: the process saves at least 90 % of what the KV cache saves, less the scratch."""
    model = models(BIG)
    n_ctx = IMAGES * 256 + 256
    script = [*[s for i in range(IMAGES) for s in (image(IMAGE, seed=i), compress())], text(4), rss(), stats()]
    common = {"n_ctx": n_ctx, "n_batch": 256, "n_ubatch": 256, "flash_attn": True}
    # the first case warms up the allocator and the model
    warm = Case("warm", model, [text(256), image(IMAGE), text(4)], **common | {"n_ctx": 1024})
    capsule = {"capsule": capsules(model, tiers=(4,)), "quality": 1e9, "n_hot": 512}
    before = stock([warm, Case("a", model, [s for s in script if s["op"] not in ("compress", "stats")], **common)])["a"].values("rss")[-1]
    ours = patched([warm, Case("a", model, script, **common, **capsule)])["a"]
    seen = ours.values("stats")[0]
    assert seen["n_cold"] == IMAGES * 256
    kv = -(-n_ctx // 256) * 256 * seen["bytes_f16_token"] - seen["bytes_hot"] - seen["bytes_pools"]
    saved = before - ours.values("rss")[-1]
    assert saved >= 0.9 * (kv - seen["bytes_scratch"])
    assert kv > 30e6
