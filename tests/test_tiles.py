"""Pictures of any shape are cut into tiles: nothing is lost with them, in any order of cuts, forks and states."""

from __future__ import annotations

import pytest
from llama_runner import Case, compress, image, lossless_limit, nmse, positions, rounded_limit, seq_cp, seq_rm, state_load, state_save, stats, text
from test_lossless import stock_steps

from kvcapsule_gguf.codec.tiles import cut_grid

SIDE = 9  # of a square where positions tell no places

# grids with and without a rest at the right and at the bottom; of one row; smaller than a tile
GRIDS = [(8, 8), (4, 12), (7, 9), (5, 16), (16, 5), (3, 11), (1, 40), (2, 3), (13, 14)]
CASES = [(arch, fa, grid) for arch in ("qwen2vl", "qwen3vl") for fa in (False, True) for grid in GRIDS]
CASES += [("llama", fa, (SIDE, SIDE)) for fa in (False, True)]
PATHS = ("", "unpack", "host")


def name_of(arch: str, fa: bool, grid: tuple[int, int]) -> str:
    return f"{arch}-{fa}-{grid[0]}x{grid[1]}"


@pytest.fixture(scope="module")
def lossless(models, capsules, stock, patched):
    truth, ours = [], []
    for arch, fa, grid in CASES:
        model = models(arch=arch)
        script = [text(5), image(grid, seed=1), compress(), text(5, seed=1), text(4, seed=2, one_by_one=True), image(grid, seed=2), compress(), text(4, seed=3), stats()]
        common = {"flash_attn": fa, "type_k": "f32", "type_v": "f32"}
        truth.append(Case(name_of(arch, fa, grid), model, stock_steps(script), **common))
        ours.append(Case(name_of(arch, fa, grid), model, script, capsule=capsules(model), **common))
    return stock(truth), {path: patched(ours, env={"LLAMA_KVCAPSULE_PATH": path}) for path in PATHS}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("arch", "fa", "grid"), CASES)
def test_lossless_tiles_are_stock(lossless, arch, fa, grid, path):
    truth, ours = (r[name_of(arch, fa, grid)] for r in (lossless[0], lossless[1][path]))
    assert nmse(ours.logits(), truth.logits()) <= (rounded_limit if path else lossless_limit)(fa, "f32")
    seen = ours.values("stats")[-1]
    assert (sum(seen["n_slots_tier"]), seen["n_hot_vision"]) == (2 * len(cut_grid(*grid)), 0)


# --- sequences and states ---


@pytest.mark.parametrize("arch", ["qwen2vl", "llama"])
def test_cuts_forks_and_states(models, capsules, stock, patched, arch):
    model = models(arch=arch)
    grid = (9, 7) if arch == "qwen2vl" else (SIDE, SIDE)
    # inside the slots of a square: a part of a row, which lies in two tiles; with M-RoPE an image has one position
    hole = [seq_rm(0, 5 + 18, 5 + 27)] if arch == "llama" else []
    script = [
        text(5), image(grid, seed=1), compress(), text(4, seed=1), seq_cp(0, 1), *hole, text(3, seed=2), text(3, seed=3, seq=1), image(grid, seed=4, seq=1), compress(1),
        text(3, seed=5, seq=1), seq_rm(1, 5 + grid[0] ** 2 if arch == "llama" else 20), state_save("all"), state_load("all"), positions(0), positions(1),
        text(3, seed=6), stats(),
    ]  # fmt: skip
    common = {"type_k": "f32", "type_v": "f32", "n_seq_max": 2}
    truth = stock([Case("a", model, stock_steps(script), **common)])["a"]
    ours = patched([Case("a", model, script, capsule=capsules(model), **common)])["a"]
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(False, "f32")
    assert ours.values("positions") == truth.values("positions")[-3:-1]
    assert ours.values("stats")[-1]["n_cold"] == grid[0] * grid[1]


def test_images_side_by_side_are_cut_each(models, capsules, patched):
    """A run of two images of a known size, and one that was cut off: tiles begin anew with each."""
    model = models(arch="llama")
    script = [text(5), image((SIDE, SIDE), seed=1), image((SIDE, SIDE), seed=2), image((3, SIDE), seed=3), compress(), stats()]
    seen = patched([Case("a", model, script, capsule=capsules(model), image_tokens=SIDE**2)])["a"].values("stats")[0]
    assert (sum(seen["n_slots_tier"]), seen["n_hot_vision"]) == (2 * len(cut_grid(SIDE, SIDE)) + len(cut_grid(3, SIDE)), 0)
