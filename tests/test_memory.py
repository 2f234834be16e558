"""Memory is what the row counts say, and the process really is smaller."""

from __future__ import annotations

import gguf
import pytest
from llama_runner import Case, breakdown, compress, image, rss, stats, text
from native_code import shared_library
from tiny_gguf import TinyModel

N = 16
ROW = {  # bytes of a row of length d, in the file's order of types
    "f32": lambda d: 4 * d, "f16": lambda d: 2 * d, "q8_0": lambda d: d // 32 * 34, "q4_0": lambda d: d // 32 * 18, "q2_0": lambda d: d // 64 * 18}


def slot_bytes(path, tier: int, heads: int, d: int) -> int:
    f = {k: v.contents() for k, v in gguf.GGUFReader(path).fields.items()}
    n_layer = len(f["kvcapsule.layers"])
    total = 0
    for which in ("key", "value"):
        rows = f[f"kvcapsule.tier.{which}_rows"][5 * n_layer * tier:5 * n_layer * (tier + 1)]
        total += sum(n * ROW[t](d) * heads for i, n in enumerate(rows) for t in [list(ROW)[i % 5]])
    return total


SMALL = [TinyModel("llama"), TinyModel("qwen2", head=96), TinyModel("qwen2vl", head=80)]


@pytest.mark.parametrize("model", SMALL, ids=lambda m: f"{m.arch}-{m.head}")
@pytest.mark.parametrize("lossless", [True, False])
def test_bytes_are_those_of_the_rows(models, capsules, patched, model, lossless):
    capsule = capsules(models(model), block_size=N, lossless=lossless)
    case = Case("a", models(model), [text(4), image((8, 8)), image((6, 10), seed=1), compress(), stats()], n_ctx=2048, n_hot=512, capsule=capsule)
    seen = patched([case])["a"].values("stats")[0]
    fields = {k: v.contents() for k, v in gguf.GGUFReader(capsule).fields.items()}
    ratios = fields["kvcapsule.tier.ratio"]
    economy = min(range(1, len(ratios)), key=lambda i: abs(ratios[i] - fields["kvcapsule.default_ratio"]))
    f16_token = model.n_layer * model.n_head_kv * 2 * model.head * 2
    assert seen["bytes_f16_token"] == f16_token
    assert seen["bytes_hot"] == 512 * f16_token
    assert seen["bytes_slot"] == [slot_bytes(capsule, tier, model.n_head_kv, model.head) for tier in (economy, 0)]
    assert ratios[economy] == pytest.approx(1 - seen["bytes_slot"][0] / (N * f16_token), abs=1e-3)
    assert sum(seen["n_slots"]) == 8
    assert seen["bytes_slots"] == sum(n * b for n, b in zip(seen["n_slots"], seen["bytes_slot"]))
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
    seen = patched([Case("a", models(SMALL[0]), [*steps, stats(), breakdown(account)], n_ctx=4096, n_hot=512, capsule=capsules(models(SMALL[0]), block_size=N))])["a"]
    for kept, told in zip(seen.values("stats"), seen.values("breakdown")):
        counted = kept["bytes_hot"] + kept["bytes_pools"] + kept["bytes_scratch"]
        assert counted <= told <= counted + 2**18  # bases in the scratch, rounding of buffers
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
    capsule = {"capsule": capsules(model, block_size=64, lossless=False), "n_hot": 512}
    before = stock([warm, Case("a", model, [s for s in script if s["op"] not in ("compress", "stats")], **common)])["a"].values("rss")[-1]
    ours = patched([warm, Case("a", model, script, **common, **capsule)])["a"]
    seen = ours.values("stats")[0]
    assert seen["n_cold"] == IMAGES * 256
    kv = -(-n_ctx // 256) * 256 * seen["bytes_f16_token"] - seen["bytes_hot"] - seen["bytes_pools"]
    saved = before - ours.values("rss")[-1]
    assert saved >= 0.9 * (kv - seen["bytes_scratch"])
    assert kv > 30e6
