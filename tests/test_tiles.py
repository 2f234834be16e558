"""Blocks that are tiles of the picture's grid: which tokens they hold, that nothing is lost with them, and that they hold what the reference encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llama_runner import Case, compress, image, lossless_limit, nmse, positions, read_kv, rounded_limit, seq_cp, seq_rm, state_load, state_save, stats, text
from test_lossless import stock_steps
from test_paths import PATHS, SECOND

from kvcapsule_gguf.codec.cut import BlockShape, tile_order
from kvcapsule_gguf.format.block import BlockCodec
from kvcapsule_gguf.format.reader import read_capsule

N, W = 16, 4  # tiles of 4 x 4
SIDE = 8  # of a fixed grid


# --- which tokens ---


def by_hand(h: int, w: int, bx: int, by: int) -> list[tuple[int, int]]:
    """The rule of docs/design/codec.md, in loops."""
    tiles = [[(y, x) for y in range(top, min(top + by, h)) for x in range(left, min(left + bx, w))] for top in range(0, h, by) for left in range(0, w, bx)]
    return [place for whole in (True, False) for tile in tiles if (len(tile) == bx * by) == whole for place in tile]


@pytest.mark.parametrize(("bx", "by"), [(4, 4), (8, 8), (8, 2), (1, 16), (3, 5)])
def test_the_order_is_the_rule(bx, by):
    for h in (1, 3, 4, 8, 13, 17):
        for w in (1, 2, 4, 7, 16, 19):
            order = BlockShape(bx * by, bx).order(h * w, w)
            assert [divmod(int(i), w) for i in order] == by_hand(h, w, bx, by)


def test_any_set_of_tokens_has_an_order():
    """Of an image that is not whole, moved, in any order: every token once, whole tiles first."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        h, w = rng.integers(1, 20, 2)
        some = rng.permutation(h * w)[: rng.integers(0, h * w + 1)]
        y, x = np.divmod(some, w)
        order = tile_order(y + 100, x - 7, 4, 3)
        assert sorted(order.tolist()) == list(range(len(some)))
        if len(some):
            ty, tx = (y - y.min()) // 3, (x - x.min()) // 4
            count = {}
            for tile in zip(ty.tolist(), tx.tolist()):
                count[tile] = count.get(tile, 0) + 1
            whole = [count[ty[i], tx[i]] == 12 for i in order]
            assert whole == sorted(whole, reverse=True)


def test_block_shapes_are_read():
    assert BlockShape.parse("raster:64") == BlockShape(64) and BlockShape.parse("tile:8x6") == BlockShape(48, 8)
    assert [str(BlockShape.parse(x)) for x in ("raster:64", "tile:8x6")] == ["raster:64", "tile:8x6"]
    for bad in ("64", "tile:8", "tile:8x", "tile:0x8", "tile:-8x8", "raster:", "tile:8x8x8", "TILE:8x8"):
        with pytest.raises(ValueError, match="neither raster:N nor tile:WxH"):
            BlockShape.parse(bad)


# --- nothing is lost ---

# grids with and without a rest at the right and at the bottom; of one row; smaller than a tile
GRIDS = [(8, 8), (4, 12), (7, 9), (5, 16), (16, 5), (3, 11), (1, 40), (2, 3), (13, 14)]
CASES = [(arch, fa, grid) for arch in ("qwen2vl", "qwen3vl") for fa in (False, True) for grid in GRIDS]
CASES += [("llama", fa, (SIDE, SIDE)) for fa in (False, True)]


def file_of(arch: str, **more: Any) -> dict[str, Any]:
    return {"block_size": N, "tile_width": W, "image_tokens": SIDE**2 if arch == "llama" else 0} | more


def name_of(arch: str, fa: bool, grid: tuple[int, int]) -> str:
    return f"{arch}-{fa}-{grid[0]}x{grid[1]}"


@pytest.fixture(scope="module")
def lossless(models, capsules, stock, patched):
    truth, ours = [], {path: [] for path in ("fused", "unpack", "reconstruct")}
    for arch, fa, grid in CASES:
        model = models(arch=arch)
        script = [text(5), image(grid, seed=1), compress(), text(5, seed=1), text(4, seed=2, one_by_one=True), image(grid, seed=2), compress(), text(4, seed=3), stats()]
        common = {"flash_attn": fa, "type_k": "f32", "type_v": "f32"}
        truth.append(Case(name_of(arch, fa, grid), model, stock_steps(script), **common))
        for path in ours:
            ours[path].append(Case(name_of(arch, fa, grid), model, script, capsule=capsules(model, **file_of(arch)), **common))
    return stock(truth), {path: patched(cases, env={"LLAMA_KVCAPSULE_PATH": path}) for path, cases in ours.items()}


@pytest.mark.parametrize("path", ["fused", "unpack", "reconstruct"])
@pytest.mark.parametrize(("arch", "fa", "grid"), CASES)
def test_lossless_tiles_are_stock(lossless, arch, fa, grid, path):
    truth, ours = (r[name_of(arch, fa, grid)] for r in (lossless[0], lossless[1][path]))
    limit = lossless_limit(fa, "f32") if path == "fused" else rounded_limit(fa, "f32")
    assert nmse(ours.logits(), truth.logits()) <= limit
    n = grid[0] * grid[1]
    padded = n % N >= N // 2
    seen = ours.values("stats")[-1]
    # whatever the shape of the picture: less than half a block of it stays hot, and one slot at most is padded
    assert seen["n_slots"] == [2 * (n // N), 2 * padded] and seen["n_hot_vision"] == (0 if padded else 2 * (n % N))


# --- and what is stored is what the reference stores ---

LOSSY = {
    "pca": {"lossless": False},
    "retain": {"lossless": False, "key_codec": "retain", "kept": 6, "neighbours": 4, "mlp_width": 8, "rows": (0, 0, 0, 6, 10)},
}
LOOK = {"qwen2vl": (7, 9), "qwen3vl": (13, 6), "llama": (SIDE, SIDE)}  # 63 tokens: 3 blocks and 15 in a padded slot; 78: 4 and 14


@pytest.fixture(scope="module")
def lossy(models, capsules, patched):
    cases = []
    for arch, grid in LOOK.items():
        for kind, file in LOSSY.items():
            reads = [read_kv(il) for il in range(2)]
            steps = [text(7), image(grid, seed=1), *reads, compress(), *reads, text(6, seed=1), image(grid, seed=2), compress(), text(4, seed=2, one_by_one=True), stats()]
            cases.append(Case(f"{arch}-{kind}", models(arch=arch), steps, capsule=capsules(models(arch=arch), **file_of(arch, **file))))
    return {path: patched(cases, env=env) for path, env in PATHS.items()}


@pytest.mark.parametrize("arch", LOOK)
@pytest.mark.parametrize("kind", LOSSY)
def test_a_tile_holds_what_the_reference_encodes(lossy, models, capsules, arch, kind):
    result = lossy["fused, 8 bits"][f"{arch}-{kind}"]
    h, w = LOOK[arch]
    content = read_capsule(capsules(models(arch=arch), **file_of(arch, **LOSSY[kind])))
    order = [y * w + x for y, x in by_hand(h, w, W, N // W)]
    for il in range(2):
        before, after = ([result.steps[i + il].arrays[x][7:] for x in "kv"] for i in (2, 5))
        layer = content.layers[il]
        for i in range(0, h * w, N):
            tokens = order[i : i + N]
            tier = 1 if len(tokens) == N else 0
            block = [np.concatenate([x[tokens], np.repeat(mean[None], N - len(tokens), 0)]).swapaxes(0, 1) for x, mean in zip(before, (layer.k_mean, layer.v_mean))]
            for x, ours, wanted in zip(before, after, BlockCodec.of(content, il, tier).round_trip(*block)):
                wanted = wanted.swapaxes(0, 1)[: len(tokens)]
                flat = [a.reshape(len(tokens), -1) for a in (ours[tokens], wanted, x[tokens])]
                loss = nmse(flat[1], flat[2])
                assert loss > 1e-8  # it is lossy
                assert nmse(flat[0], flat[1]) <= 1e-6 + 1e-3 * loss  # a value halfway between two codes may go either way


@pytest.mark.parametrize("path", [p for p in PATHS if p != "reconstruct"])
@pytest.mark.parametrize("arch", LOOK)
@pytest.mark.parametrize("kind", LOSSY)
def test_the_paths_agree_on_tiles(lossy, arch, kind, path):
    first = 6  # logits that know one image only, see test_paths
    ours, reconstruct = (lossy[p][f"{arch}-{kind}"].logits() for p in (path, "reconstruct"))
    ours, reconstruct = ours[7:], reconstruct[7:]
    assert nmse(ours[:first], reconstruct[:first]) <= (3e-4 if "8 bits" in path else 3e-7)
    assert nmse(ours, reconstruct) <= SECOND


# --- sequences and states ---


@pytest.mark.parametrize("arch", ["qwen2vl", "llama"])
def test_cuts_forks_and_states(models, capsules, stock, patched, arch):
    model = models(arch=arch)
    grid = (9, 7) if arch == "qwen2vl" else (SIDE, SIDE)
    # inside the slots of a fixed grid: a part of a row, which lies in two tiles; with M-RoPE an image has one position
    hole = [seq_rm(0, 5 + 18, 5 + 23)] if arch == "llama" else []
    script = [
        text(5), image(grid, seed=1), compress(), text(4, seed=1), seq_cp(0, 1), *hole, text(3, seed=2), text(3, seed=3, seq=1), image(grid, seed=4, seq=1), compress(1),
        text(3, seed=5, seq=1), seq_rm(1, 5 + grid[0] ** 2 if arch == "llama" else 20), state_save("all"), state_load("all"), positions(0), positions(1),
        text(3, seed=6), stats(),
    ]
    common = {"type_k": "f32", "type_v": "f32", "n_seq_max": 2}
    truth = stock([Case("a", model, stock_steps(script), **common)])["a"]
    ours = patched([Case("a", model, script, capsule=capsules(model, **file_of(arch)), **common)])["a"]
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(False, "f32")
    assert ours.values("positions") == truth.values("positions")[-3:-1]
    assert ours.values("stats")[-1]["n_cold"] > 2 * N


def test_images_side_by_side_are_cut_each(models, capsules, patched):
    """A run of two images of a fixed grid, and one that was cut off: tiles begin anew with each."""
    model = models(arch="llama")
    script = [text(5), image((SIDE, SIDE), seed=1), image((SIDE, SIDE), seed=2), image((3, SIDE), seed=3), compress(), stats()]
    seen = patched([Case("a", model, script, capsule=capsules(model, **file_of("llama")))])["a"].values("stats")[0]
    assert seen["n_slots"] == [2 * SIDE**2 // N + 1, 1] and seen["n_hot_vision"] == 0
