"""A cache with a capsule of format v2: how pictures are cut, which tier a tile gets and what is read from it, by the reference; pools that are filled, emptied and filled again."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import numpy as np
import pytest
from llama_runner import Case, compress, image, image_file, lossless_limit, nmse, read_kv, seq_rm, set_pos, state_load, state_save, stats, text
from make_capsule import random_capsule

from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.head import F16
from kvcapsule_gguf.codec.quality import QUALITY, choose, score
from kvcapsule_gguf.codec.quantize import decode_q4_0, encode_q4_0
from kvcapsule_gguf.codec.tiles import cut_grid, cut_run
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule, write_tile_capsule

OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 4096}
LAYERS = 2


def without_capsule(steps):
    return [s for s in steps if s["op"] not in ("compress", "stats")]


def like_stock(patched, stock, model, capsule, steps, **options):
    """The result of ours, whose logits are those of the stock library."""
    ours = patched([Case("a", model, steps, capsule=capsule, **OPTIONS | options)])["a"]
    truth = stock([Case("a", model, without_capsule(steps), **OPTIONS | {k: v for k, v in options.items() if k not in ("auto_compress", "n_hot", "env")})])["a"]
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(False, "f32")
    return ours


# --- shapes ---


@pytest.mark.parametrize("auto", [False, True])
def test_images_of_all_small_sizes(models, capsules, stock, patched, auto):
    """Of 1 to 70 tokens, without a grid: a square number of tokens is a square, others are runs."""
    model = models(arch="llama", head=32, n_head=2, n_head_kv=1, n_ff=64)
    steps = [text(3), *[s for n in range(1, 71) for s in (image(n, seed=n), text(1, seed=n))]]
    ours = like_stock(patched, stock, model, capsules(model), [*steps, *([] if auto else [compress()]), text(5, seed=1), stats()], auto_compress=auto)
    seen = ours.values("stats")[0]
    cuts = [cut_grid(isqrt(n), isqrt(n)) if isqrt(n) ** 2 == n else cut_run(n) for n in range(1, 71)]
    assert sum(seen["n_slots_tier"]) == sum(map(len, cuts))
    assert (seen["n_cold"], seen["n_hot_vision"]) == (sum(range(71)), 0)


def test_ragged_grids(models, capsules, stock, patched):
    model = models(arch="qwen2vl", head=32, n_head=2, n_head_kv=1, n_ff=64)
    grids = [(2, 1), (1, 9), (9, 1), (7, 13), (8, 8), (9, 9), (16, 24), (17, 5), (3, 70), (20, 23)]
    steps = [text(3), *[s for i, grid in enumerate(grids) for s in (image(grid, seed=i), compress(), text(2, seed=i), stats())], text(5)]
    ours = like_stock(patched, stock, model, capsules(model), steps)
    slots = np.cumsum([len(cut_grid(*grid)) for grid in grids])
    assert [sum(s["n_slots_tier"]) for s in ours.values("stats")] == slots.tolist()
    assert all(s["n_hot_vision"] == 0 for s in ours.values("stats"))


@pytest.mark.parametrize("path", ["", "unpack"])
@pytest.mark.parametrize("codec", ["learned", "retain"])
def test_transforms_are_lossless_too(models, capsules, stock, patched, codec, path):
    """Whole tiles with a transform beside short ones, in one picture and in a run."""
    model = models(arch="qwen2vl", head=32, n_head=2, n_head_kv=1, n_ff=64)
    steps = [text(3), image((17, 16), seed=1), compress(), text(4), image(80, seed=2), compress(), *[text(1, seed=i) for i in range(3)]]
    like_stock(patched, stock, model, capsules(model, codec=codec, mlp=3), steps, env={"LLAMA_KVCAPSULE_PATH": path})


# --- tiers: the reference chooses the same, and reads the same ---


def picture(path, h, w, n_embd, seed):
    """Tokens that differ from tile to tile: smooth, rough, loud, nearly still."""
    rng = np.random.default_rng(seed)
    y, x = np.divmod(np.arange(h * w), w)
    smooth = rng.standard_normal((4, n_embd))
    base = smooth[0] + np.stack([y / h, x / w, y * x / (h * w)], 1) @ smooth[1:]
    tile = y // 8 * 100 + x // 8
    noise = np.array([0.1, 0.7, 2.0, 8.0])[(tile * 7 + seed) % 4]
    np.save(path, (base + noise[:, None] * rng.standard_normal((h * w, n_embd))).astype(np.float32))
    return path


def graded(model, path, energy, codec="dct", tiers=(2, 3, 4, 6)):
    """Tiers of so many bits, the constant row in f16."""
    capsule = read_tile_capsule(random_capsule(model, path, tiers=tiers, energy=energy, codec=codec, mlp=3))
    for layer in capsule.layers:
        layer.k_table[:, :, 0] = layer.v_table[:, :, 0] = F16
    write_tile_capsule(path, capsule)
    return read_tile_capsule(path)


def rival_error(x):
    rotated = hadamard(np.asarray(x, np.float32))
    d = x.shape[-1]
    return float(np.square(decode_q4_0(encode_q4_0(rotated.reshape(-1, d)), d).reshape(x.shape) - rotated).sum(dtype=np.float64))


def tile_scores(capsule, keys, values, h, w, tokens):
    """f64 [tiers]: the score of one tile; and what each tier reads, [tiers][kind][layer] f32 [n, H, d]."""
    scores, reads = [], []
    energy = np.array([e for x in capsule.layers for e in (x.k_energy, x.v_energy)]) * len(tokens) / 64
    for tier in range(len(capsule.smaller)):
        errors, rivals, read = [], [], []
        for i in range(len(capsule.layers)):
            for kind, x in (("k", keys[i][tokens]), ("v", values[i][tokens])):
                heads = capsule.heads(i, kind, tier)
                got = np.stack([head.decode(head.encode(x[:, n], h, w), h, w) for n, head in enumerate(heads)], 1)
                errors.append(np.square(got - x).sum(dtype=np.float64))
                rivals.append(rival_error(x))
                read.append(got)
        scores.append(score(np.array(errors), np.array(rivals), energy))
        reads.append(read)
    return np.array(scores), reads


def check_choice(patched, model, path, capsule, picture_file, h, w):
    """Compresses a picture: the tier of each tile, and what is read from it, also after a saved state, are those of the reference.

    Returns for each tile the tier it took and the one that layer 0 alone would have taken, int [tiles, 2]; -1: it stays hot.
    """
    reads = [read_kv(i, p0=3) for i in range(LAYERS)]
    steps = [text(3), image_file(picture_file, h, w), *reads, compress(), *reads, stats(), state_save("s"), state_load("s"), *reads]
    result = patched([Case("a", model, steps, capsule=path, **OPTIONS)])["a"]
    assert not result.error, result.error
    found = [step for step in result.steps if "k" in step.arrays]
    before, after, again = (found[i:i + LAYERS] for i in (0, LAYERS, 2 * LAYERS))
    keys, values = ([step.arrays[kind] for step in before] for kind in "kv")
    first = next(i for i, x in enumerate(capsule.smaller) if x < 7)
    taken, hot, tiers = np.zeros(16, int), 0, []
    for th, tw, tokens in cut_grid(h, w):
        scores, read = tile_scores(capsule, keys, values, th, tw, tokens)
        assert np.abs(scores / QUALITY - 1).min() > 1e-3, "too close to call: another seed"
        tier = int(choose(scores[first:, None], QUALITY)[0])
        early = tile_scores(replace(capsule, layers=capsule.layers[:1]), keys, values, th, tw, tokens)[0]
        tiers.append((tier, int(choose(early[first:, None], QUALITY)[0])))
        hot += len(tokens) * (tier < 0)
        taken[first + tier] += tier >= 0
        for i in range(LAYERS):
            for j, kind in enumerate("kv"):
                want, got = read[first + tier][2 * i + j] if tier >= 0 else before[i].arrays[kind][tokens], after[i].arrays[kind][tokens]
                assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()
                assert np.array_equal(got, again[i].arrays[kind][tokens])
    seen = result.values("stats")[0]
    assert (seen["n_slots_tier"], seen["n_hot_vision"]) == (taken.tolist(), hot)
    assert (taken > 0).sum() + (hot > 0) >= 2
    return np.array(tiers)


@pytest.mark.parametrize(("arch", "energy", "codec"), [
    ("llama", 1e6, "dct"), ("llama", 500.0, "dct"), ("qwen2vl", 1e6, "dct"), ("qwen2vl", 500.0, "dct"), ("llama", 1e6, "retain"), ("qwen2vl", 500.0, "learned"),
])  # fmt: skip
def test_tiers_and_values_are_those_of_the_reference(models, patched, tmp_path, arch, energy, codec):
    model = models(arch=arch, head=64, n_head=2, n_head_kv=1, n_ff=64)
    path = tmp_path / "graded.gguf"
    h, w = (17, 17) if arch == "llama" else (18, 13)
    check_choice(patched, model, path, graded(model, path, energy, codec), picture(tmp_path / "a.npy", h, w, 128, 1), h, w)


def test_a_layer_that_needs_far_more_bits_than_those_before_it(models, patched, tmp_path):
    """Only the tiers that a tile is likely to take are measured. When a later layer needs far more bits, the others are measured too."""
    model = models(arch="qwen2vl", head=64, n_head=2, n_head_kv=1, n_ff=64)
    path = tmp_path / "graded.gguf"
    capsule = graded(model, path, 1e6, tiers=(1, 2, 3, 4, 6, 8))
    capsule.layers[1] = replace(capsule.layers[1], k_energy=22.0, v_energy=22.0)
    write_tile_capsule(path, capsule)
    tiers = check_choice(patched, model, path, read_tile_capsule(path), picture(tmp_path / "a.npy", 16, 32, 128, 2), 16, 32)
    assert (tiers[:, 0] - tiers[:, 1]).max() >= 3


def test_no_tier_is_good_enough(models, capsules, patched):
    """The tiles stay hot, and nothing is lost."""
    model = models(arch="llama", head=64, n_head=2, n_head_kv=2, n_ff=64)
    steps = [text(3), image(64, seed=1), compress(), stats(), text(3)]
    result = patched([Case("a", model, steps, capsule=capsules(model, tiers=(2, 3)), **OPTIONS), Case("b", model, without_capsule(steps), **OPTIONS)])
    seen = result["a"].values("stats")[0]
    assert (seen["n_cold"], seen["n_hot_vision"]) == (0, 64)
    assert np.array_equal(result["a"].logits(), result["b"].logits())


# --- pools ---


def test_what_images_leave_is_used_again(models, capsules, stock, patched):
    """Images that go make room for others of another shape: pools grow no more, and what stays is moved, not lost."""
    model = models(arch="qwen2vl", head=32, n_head=2, n_head_kv=1, n_ff=64)
    one, steps = 8 + 2, [text(4)]
    for i in range(12):
        steps += [image((8, 8), seed=i), compress(), text(2, seed=i)]
    steps += [stats()]
    for i in range(0, 12, 2):  # every other one goes, M-RoPE counts 8 positions for it
        steps += [seq_rm(0, 4 + i * one, 4 + i * one + 8)]
    steps += [text(3, seed=50)]
    for i in range(10):
        steps += [image((7, 9), seed=20 + i), compress(), text(2, seed=i), stats(), seq_rm(0, 4 + (2 * i + 1) % 12 * one, 4 + (2 * i + 1) % 12 * one + 8)]
    steps += [text(6, seed=51)]
    ours = like_stock(patched, stock, model, capsules(model), steps)
    pools = [s["bytes_pools"] for s in ours.values("stats")]
    assert max(pools) == pools[0]


def test_a_loop_of_images_needs_no_more_memory(models, capsules, patched):
    model = models(arch="llama", head=32, n_head=2, n_head_kv=1, n_ff=64)
    steps = [s for i in range(40) for s in (seq_rm(0, 0), set_pos(0, 0), text(4), image(16 + 7 * (i % 9), seed=i), compress(), text(2), stats())]
    result = patched([Case("a", model, steps, capsule=capsules(model), **OPTIONS)])["a"]
    pools = [s["bytes_pools"] for s in result.values("stats")]
    assert max(pools) == max(pools[:9]) and result.values("stats")[-1]["n_cold"] == 16 + 7 * (39 % 9)
