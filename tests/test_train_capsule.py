"""Training as a whole: from arrays to a file that compresses as promised, the guard, the pictures, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, library
from PIL import Image
from synthetic_kv import sample, source

from kvcapsule_gguf.codec.cut import BlockShape
from kvcapsule_gguf.codec.guard import block_score
from kvcapsule_gguf.codec.rope import pair_index
from kvcapsule_gguf.codec.types import total_rows
from kvcapsule_gguf.eval.pictures import UnreadablePicture, from_folder, readable
from kvcapsule_gguf.format.block import BlockCodec
from kvcapsule_gguf.format.capsule import PCA, RETAIN
from kvcapsule_gguf.format.reader import read_capsule
from kvcapsule_gguf.format.writer import write_capsule
from kvcapsule_gguf.runtime.errors import KVCapsuleError
from kvcapsule_gguf.train.images import Drawn
from kvcapsule_gguf.train.shapes import choose_block, plan
from kvcapsule_gguf.train.source import ArraySource, KVSample, Shape, TrainError
from kvcapsule_gguf.train.store import BlockStore
from kvcapsule_gguf.train.trainer import TrainOptions, train

QUIET = {"say": lambda line: None}


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(y - x).sum() / np.square(x - x.mean((0, 2), keepdims=True)).sum())


@pytest.fixture(scope="module")
def trained(models):
    done = {}

    def get(codec: str = "pca", arch: str = "llama", head: int = 64, layers: str = "uniform"):
        key = (codec, arch, head, layers)
        if key not in done:
            done[key] = train(source(models(arch=arch, head=head), 16), TrainOptions(codec=codec, layers=layers, block=BlockShape(64)), **QUIET)
        return done[key]

    return get


def blocks(capsule, seed: int, model):
    """K and V [B, H, N, d] of the first layer of a new image."""
    s = sample(model, seed)
    return [x.reshape(-1, capsule.block_size, *x.shape[1:]).swapaxes(1, 2) for x in (s.keys[0], s.values[0])]


@pytest.mark.parametrize("codec", ["pca", "retain"])
@pytest.mark.parametrize(("arch", "head"), [("llama", 64), ("qwen2", 96), ("qwen2vl", 80), ("qwen3vl", 128)])
def test_a_trained_capsule_is_a_valid_file(trained, tmp_path, codec, arch, head):
    capsule = trained(codec, arch, head)
    again = read_capsule(write_capsule(tmp_path / "c.gguf", capsule))
    assert again.tiers == capsule.tiers or [t.name for t in again.tiers] == ["faithful", "paper", "default", "small"]
    # with M-RoPE pictures may have any size, whatever those trained on have
    assert (again.block_size, again.image_tokens, again.block_width) == (64, 0 if "vl" in arch else 256, 16)
    assert again.base.rope_type == {"llama": "norm", "qwen2": "neox", "qwen2vl": "mrope", "qwen3vl": "imrope"}[arch]
    if head % 32 == 0:
        assert all(k > 0 for t in again.tiers[2:] for k in t.kappa) and again.tiers[1].kappa == [0.0] * len(again.layers)
    if head % 64 == 0 and codec == "pca":
        assert [round(t.ratio, 2) for t in again.tiers[1:]] == pytest.approx([0.6, 0.8, 0.875], abs=0.01)
        assert again.tier_for_ratio() == 2


@pytest.mark.parametrize("codec", ["pca", "retain"])
def test_it_compresses_pictures_it_has_not_seen(trained, models, codec):
    """Errors grow with the ratio and stay small; the faithful tier is better than q4_0 (0.0078) on every picture."""
    from kvcapsule_gguf.format.base_model import read_base_model

    capsule, model = trained(codec), read_base_model(models(arch="llama"))
    k, v = blocks(capsule, 999, model)
    errors = []
    for tier in range(4):
        k_hat, v_hat = BlockCodec.of(capsule, 0, tier).round_trip(k, v)
        errors.append((relative(k, k_hat), relative(v, v_hat)))
    assert max(errors[0]) < 0.0078
    assert errors[1] < errors[2] < errors[3]
    assert max(errors[2]) < 0.03


def test_gates_are_tied_in_the_file(trained):
    for arch, rope in (("llama", "norm"), ("qwen2", "neox")):
        gate = trained("retain", arch, 64 if arch == "llama" else 96).layers[0].k_gate
        first, second = pair_index(rope, gate.shape[-1]).T
        assert np.array_equal(gate[..., first], gate[..., second]) and np.ptp(gate) > 0


@pytest.mark.parametrize("codec", ["pca", "retain"])
def test_the_guard_sees_wild_tokens(trained, models, codec):
    """New pictures pass in the default tier, most of them; a wild outlier token at any position sends its block away, and no other block."""
    from kvcapsule_gguf.format.base_model import read_base_model

    capsule, model = trained(codec), read_base_model(models(arch="llama"))
    layer, codec_ = capsule.layers[0], BlockCodec.of(capsule, 0, 2)
    kappa = capsule.tiers[2].kappa[0]

    def score(k, v):
        return block_score(k, v, *codec_.round_trip(k, v), layer.k_query_weight)

    fine = np.concatenate([score(*blocks(capsule, seed, model)) for seed in range(500, 510)])
    assert (fine <= kappa).mean() > (0.8 if codec == "pca" else 0.5)
    rng = np.random.default_rng(0)
    k, v = blocks(capsule, 600, model)
    before = score(k, v)
    for at in rng.integers(0, 64, 8):
        wild = 30 * rng.standard_normal((2, 64))
        for in_keys in (True, False):
            k_wild, v_wild = k.copy(), v.copy()
            (k_wild if in_keys else v_wild)[2, :, at] += wild
            after = score(k_wild, v_wild)
            assert np.array_equal(np.delete(after, 2), np.delete(before, 2))
            if codec == "pca" or not in_keys:
                assert after[2] > kappa
            else:  # `retain` stores a wild key as a kept token, or in its own residual: it stays local, and is refused or within 2 bits of its energy
                k_hat = codec_.decode_keys(codec_.encode_keys(k_wild))
                assert after[2] > kappa or np.square(k_hat - k_wild)[2, :, at].sum() < 0.15 * np.square(k_wild)[2, :, at].sum()


def odd_blocks(capsule, model, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V [B, H, N, d] of every layer of a new picture, in which most blocks have noise, wild tokens, loud channels or another size."""
    rng, s, n = np.random.default_rng(seed), sample(model, 1000 + seed), capsule.block_size
    layers = [[x.reshape(-1, n, *x.shape[1:]).swapaxes(1, 2) for x in pair] for pair in zip(s.keys, s.values)]
    for block in (block for pair in layers for x in pair for block in x):
        kind, token, channel = rng.integers(6), rng.integers(n, size=3), rng.integers(block.shape[-1])
        block += (kind == 1) * rng.uniform(0.1, 3) * rng.standard_normal(block.shape)
        block[:, token[:1]] += (kind == 2) * rng.uniform(2, 40) * rng.standard_normal(block[:, :1].shape)
        block[..., channel] *= rng.uniform(5, 50) if kind == 3 else 1
        block *= rng.uniform(0.01, 10) if kind == 4 else 1
        block[:, token] *= rng.uniform(0, 30) if kind == 5 else 1
    return layers


@pytest.mark.parametrize("codec", ["pca", "retain"])
def test_the_guard_refuses_no_block_that_is_worse_off_then(models, codec):
    """On ordinary and odd blocks, at presets on both sides of the faithful tier: what goes there has a smaller worst error, and at ordinary presets a smaller error."""
    ratios = {"fine": 0.5, "paper": 0.6, "middle": 0.7, "default": 0.8, "small": 0.875}
    data = source(models(arch="llama"), 16)
    capsule = train(data, TrainOptions(codec=codec, ratios=ratios, block=BlockShape(64)), **QUIET)
    refused = dict.fromkeys(ratios, 0)
    for seed in range(8):
        layers = odd_blocks(capsule, data.model, seed)
        scores, errors = [], []
        for tier in range(len(capsule.tiers)):
            worst, error = [], 0
            for (k, v), i in zip(layers, range(len(layers))):
                k_hat, v_hat = BlockCodec.of(capsule, i, tier).round_trip(k, v)
                worst.append(block_score(k, v, k_hat, v_hat, capsule.layers[i].k_query_weight))
                error = error + np.square(k_hat - k).sum((1, 2, 3)) + np.square(v_hat - v).sum((1, 2, 3))
            scores.append(np.stack(worst))
            errors.append(error)
        for tier, score, error in zip(capsule.tiers[1:], scores[1:], errors[1:]):
            kappa = np.array(tier.kappa)[:, None]
            away = ((score > kappa) & (kappa > 0)).any(0)
            refused[tier.name] += away.sum()
            assert (scores[0].max(0) <= score.max(0))[away].all(), tier.name
            assert tier.name == "middle" or (errors[0] <= error)[away].all(), tier.name
    assert refused["fine"] == refused["paper"] == 0 and min(refused["default"], refused["small"]) > 20


def test_the_same_seed_gives_the_same_file(models, tmp_path):
    pytest.importorskip("torch").set_num_threads(1)
    files = []
    for i in range(2):
        capsule = train(source(models(arch="llama"), 8), TrainOptions(codec="retain", mlp_width=16, block=BlockShape(64), seed=4), **QUIET)
        files.append(write_capsule(tmp_path / f"{i}.gguf", capsule).read_bytes())
    assert files[0] == files[1]


def test_auto_is_what_it_says(models):
    said: list[str] = []
    capsule = train(source(models(arch="llama"), 8), TrainOptions(codec="auto", block=BlockShape(64)), said.append)
    chosen = capsule.provenance["codec"]
    assert [line for line in said if line.startswith(f"--codec {chosen}: ")]
    assert set(capsule.tiers[-1].key_codec) == {RETAIN if chosen == "retain" else PCA}


def test_pyramid(trained):
    capsule = trained("pca", layers="pyramid")
    assert capsule.tiers[2].ratio == pytest.approx(0.8, abs=0.01)
    assert total_rows(capsule.tiers[2].key_rows[0]) and capsule.tiers[2].key_rows[0] != capsule.tiers[2].key_rows[1]


def test_blocks_are_chosen(models):
    def chosen(tokens: int, width: int, arch: str = "llama") -> str:
        return str(choose_block(source(models(arch=arch)).model, tokens, width))

    # a grid that is a square: tiles that divide it
    squares = {24: "tile:8x8", 27: "tile:9x9", 16: "tile:8x8", 14: "tile:7x7", 20: "tile:10x5", 12: "tile:12x6"}
    assert {side: chosen(side * side, side) for side in squares} == squares
    assert chosen(256, 0) == chosen(256, 32) == chosen(576, 0) == "raster:64" and chosen(196, 28) == "raster:49"
    assert chosen(257, 0) == chosen(23 * 23, 23) == "raster:64"  # primes: the remainder of each picture goes elsewhere
    # pictures of any shape
    assert chosen(23 * 31, 31, "qwen2vl") == "tile:8x8" and chosen(23 * 31, 0, "qwen2vl") == "raster:64"


def test_tiles_are_cut_as_the_library_does(models, tmp_path):
    """Whole tiles first, then what is left; a remainder is left out."""
    model = source(models(arch="qwen2vl")).model
    s = sample(model, 0, side=10)
    with BlockStore(model, BlockShape(32, 8), tmp_path) as store:
        store.add(0, s)
        got = store.blocks(0, "v", held=False)
    tile = [y * 10 + x for y in range(4, 8) for x in range(8)]
    left = [y * 10 + x for y in range(8) for x in (8, 9)] + [y * 10 + x for y in (8, 9) for x in range(8)]
    assert len(got) == 3
    for block, tokens in zip(got[1:], (tile, left[:32])):
        assert np.allclose(block, s.values[0][tokens].swapaxes(0, 1), rtol=1e-3, atol=1e-3)


def shapes(*tokens: int) -> list[Shape]:
    """Squares, and others as lines."""
    sides = [round(n**0.5) for n in tokens]
    return [Shape(i, f"{i}.png", n, side if side * side == n else 0) for i, (n, side) in enumerate(zip(tokens, sides))]


@pytest.mark.parametrize("at", [0, 5])
def test_one_odd_picture_is_left_out(models, at):
    """A panorama of 143 tokens among squares, the first of all or not: the blocks stay tiles, and a line names it."""
    model, tokens, said = source(models(arch="llama")).model, [576] * 8, []
    tokens[at] = 143
    block, fitting = plan(model, shapes(*tokens), None, said.append)
    assert str(block) == "tile:8x8" and [s.number for s in fitting] == [i for i in range(8) if i != at]
    assert len(said) == 1 and f"{at}.png has 143" in said[0] and "left out, 1 of 8" in said[0] and "--block raster:64" in said[0]


def test_many_odd_pictures_change_the_blocks_of_all(models):
    """Then the line says so; what the user asked for is never changed."""
    model, said = source(models(arch="llama")).model, []
    mixed = shapes(576, 256, 576, 143, 576, 300, 64, 576)
    block, fitting = plan(model, mixed, None, said.append)
    assert str(block) == "raster:64" and fitting == mixed
    assert len(said) == 1 and "4 of 8 pictures" in said[0] and "raster:64 instead of tile:8x8" in said[0]
    asked = BlockShape(64, 8)
    assert [s.number for s in plan(model, mixed, asked, said.append)[1]] == [0, 2, 4, 7] and "left out, 4 of 8" in said[1]
    with pytest.raises(TrainError, match="use --block raster:64"):
        plan(model, shapes(143, 143), asked, said.append)
    with pytest.raises(TrainError, match="a picture of 576 tokens is no whole number of blocks of 49, .* use --block raster:49, or tile:8x8"):
        plan(model, shapes(576, 576), BlockShape(49, 7), said.append)  # before hours of work: the file cannot say it
    grid = source(models(arch="qwen2vl")).model
    any_shape = [Shape(i, f"{i}.png", w * 9, w) for i, w in enumerate((9, 13, 40, 8))]
    assert plan(grid, [*any_shape, Shape(4, "tiny.png", 16, 4)], None, said.append) == (asked, any_shape) and len(said) == 3
    assert "tiny.png has 16" in said[2]
    with pytest.raises(TrainError, match="none of them can be read"):
        plan(grid, [], None, said.append)


def test_a_capsule_of_the_pictures_that_fit(models, tmp_path):
    data = source(models(arch="llama"), 8, side=8)
    data.samples[5] = sample(data.model, 5, side=16)
    capsule = train(data, TrainOptions(), work=tmp_path / "work", **QUIET)
    assert (capsule.block_shape, capsule.image_tokens, capsule.provenance["images"]) == ("tile", 64, 7)
    rows = train(data, TrainOptions(block=BlockShape(64)), **QUIET)
    assert (rows.block_shape, rows.image_tokens, rows.provenance["images"]) == ("raster", 0, 8)
    any_shape = source(models(arch="qwen2vl"), 8, side=8)
    any_shape.samples[5] = sample(any_shape.model, 5, side=11)
    any_shape.samples[6] = sample(any_shape.model, 5, side=4)  # less than a block
    capsule = train(any_shape, TrainOptions(), **QUIET)
    assert (capsule.block_shape, capsule.block_width, capsule.image_tokens) == ("tile", 8, 0) and capsule.provenance["images"] == 7


def test_retain_in_tiles(models):
    """Neighbours above and below are those of the tile."""
    capsule = train(source(models(arch="qwen2vl"), 8), TrainOptions(codec="retain", block=BlockShape(32, 8)), **QUIET)
    layer = capsule.layers[0]
    y, x = np.divmod(layer.token_order.astype(int), 8)
    dropped, near = np.arange(layer.kept_count, 32), layer.k_neighbours
    inside = (y[dropped] > 0) & (y[dropped] < 3)
    for dy in (-1, 1):
        assert ((y[near] - y[dropped, None] == dy).any(1) | ~inside).all()


# --- store ---


def test_store(models, tmp_path):
    """Blocks are consecutive tokens, a remainder is left out, every fourth image is held back."""
    model = source(models(arch="llama")).model
    samples = [sample(model, i, side=10) for i in range(5)]
    with BlockStore(model, BlockShape(32), tmp_path) as store:
        for i, s in enumerate(samples):
            store.add(i, s)
        assert store.blocks(0, "k", held=False).shape == (12, 2, 32, 64) and store.blocks(1, "v", held=True).shape == (3, 2, 32, 64)
        assert np.allclose(store.blocks(0, "k", held=True)[1], samples[3].keys[0][32:64].swapaxes(0, 1), rtol=1e-3, atol=1e-3)
        weight = store.query_weight(0)
        assert weight.mean() == pytest.approx(1, rel=1e-5) and (weight[:, 0::2] == weight[:, 1::2]).all()
        # synthetic queries have 9 times the energy in the first quarter
        assert weight[:, :16].mean() / weight[:, 16:].mean() == pytest.approx(9, rel=0.25)


def test_store_without_queries(models, tmp_path):
    model = source(models(arch="llama")).model
    s = sample(model, 0)
    with BlockStore(model, BlockShape(32), tmp_path) as store:
        store.add(0, KVSample(s.keys, s.values, [q[:0] for q in s.queries], 16))
        assert (store.query_weight(0) == 1).all()


@pytest.mark.parametrize("pictures", [10, 50])
def test_the_store_is_bounded(models, tmp_path, pictures):
    """However many pictures, no more blocks than the memory allows; from all pictures alike."""
    model = source(models(arch="llama")).model
    s = sample(model, 0)
    with BlockStore(model, BlockShape(32), tmp_path, expected=pictures, memory=20 * 4 * 2 * 32 * 64) as store:
        for i in range(pictures):
            store.add(i, s)
        assert len(store.held) == 20 and store.images == pictures
        assert (tmp_path / "k0").stat().st_size <= 20 * store._block_bytes(0, "k")
        assert sum(store.held) == pytest.approx(5, abs=3 if pictures == 10 else 2)


class Stops(ArraySource):
    """Breaks off before picture `at`, as Ctrl-C does."""

    at = 9

    def read(self, numbers=None):
        for i, s in super().read(numbers):
            if i == self.at:
                raise KeyboardInterrupt
            yield i, s


def test_interrupted_and_resumed_gives_the_same_file(models, tmp_path):
    whole = source(models(arch="llama"), 12)
    plain = write_capsule(tmp_path / "plain.gguf", train(whole, TrainOptions(seed=3), **QUIET)).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(Stops(whole.model, whole.samples), TrainOptions(seed=3), work=tmp_path / "work", **QUIET)
    (state,) = (tmp_path / "work").iterdir()
    with (state / "k1").open("ab") as f:
        f.write(b"half a picture")  # what kill -9 may leave
    said = []
    again = train(whole, TrainOptions(seed=3), said.append, tmp_path / "work")
    assert any("going on after 9 of 12" in line for line in said)
    assert write_capsule(tmp_path / "again.gguf", again).read_bytes() == plain
    assert [line for line in said if "going on" in line] == [f"going on after 9 of 12 pictures ({state})"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip"])
def test_what_is_left_of_another_training_blocks_none(models, tmp_path, damage):
    """A corrected command starts anew in the same folder, the first one still goes on there, and a damaged state is none."""
    whole, work = source(models(arch="llama"), 12), tmp_path / "work"
    fresh = write_capsule(tmp_path / "fresh.gguf", train(whole, TrainOptions(seed=4), **QUIET)).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(Stops(whole.model, whole.samples), TrainOptions(seed=3), work=work, **QUIET)
    (state,) = work.iterdir()
    said = []
    again = train(whole, TrainOptions(seed=4), said.append, work)  # another seed
    other = train(ArraySource(whole.model, whole.samples[::-1]), TrainOptions(seed=3), said.append, work)  # other pictures
    assert write_capsule(tmp_path / "again.gguf", again).read_bytes() == fresh and other.provenance["images"] == 12
    assert not [line for line in said if "going on" in line]
    assert [line for line in said if "starts anew" in line] == [
        f"other pictures than in the unfinished training in {state}, so this one starts anew; different: sample-0, sample-1, sample-10 and 9 more"
    ]
    train(whole, TrainOptions(seed=3), said.append, work)
    assert [line for line in said if f"going on after 9 of 12 pictures ({state})" in line]
    for path in work.glob("*/state.npz"):
        path.write_bytes(damage)
    assert write_capsule(tmp_path / "damaged.gguf", train(whole, TrainOptions(seed=4), work=work, **QUIET)).read_bytes() == fresh


def test_a_picture_that_is_gone_or_another_one_is_never_mistaken(models, tmp_path):
    """The model reads a folder; its training breaks off in the middle. What is resumed is bound to the names and contents of the pictures."""
    from chat_model import write_mmproj, write_model

    from kvcapsule_gguf import native
    from kvcapsule_gguf.train.collect import LlamaSource

    native.load(library("patched"))
    model, mmproj, photos, work = write_model(tmp_path / "tiny.gguf"), write_mmproj(tmp_path / "mmproj-tiny.gguf"), tmp_path / "photos", tmp_path / "work"
    photos.mkdir()
    for i in range(6):
        (photos / f"my {i}.ppm").write_bytes(b"P6 8 8 255\n" + np.random.default_rng(i).bytes(192))
    options = TrainOptions(block=BlockShape(16), codec="pca")
    gone = from_folder(photos, 9, 0).files[3]
    data = gone.read_bytes()

    def run(change=None) -> list[str]:
        """What is said, an error included. change: what happens to the folder when the third picture has been read."""
        said = []

        def say(line: str) -> None:
            said.append(line)

        try:
            with LlamaSource(model, mmproj, from_folder(photos, 9, 0), n_ctx=256, threads=1, device="cpu") as pictures:
                read = pictures.read

                def reading(numbers=None):
                    for n, (number, taken) in enumerate(read(numbers)):
                        yield number, taken
                        if change and n == 2:
                            change()

                pictures.read = reading
                said.append(write_capsule(tmp_path / "c.gguf", train(pictures, options, say, work)).read_bytes())
        except KVCapsuleError as error:
            said.append(str(error))
        return said

    assert run(gone.unlink)[-1] == f"{gone}: No such file or directory"  # in the middle: not left out in silence
    (state,) = work.iterdir()
    lines = run()
    assert f"other pictures than in the unfinished training in {state}, so this one starts anew; different: {gone.name}" in lines and not [x for x in lines if "going on" in str(x)]
    gone.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # as many bytes, another picture
    assert f"other pictures than in the unfinished training in {state}, so this one starts anew; different: {gone.name}" in run()
    gone.write_bytes(data)
    resumed = run()
    assert f"going on after 3 of 6 pictures ({state})" in resumed
    shutil.rmtree(work)
    assert run()[-1] == resumed[-1]


KILLED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
from synthetic_kv import source
from kvcapsule_gguf.train.trainer import TrainOptions, train
import os, signal

whole = source(Path({model!r}), 8)
read = whole.read
def reading(numbers=None):
    for i, s in read(numbers):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield i, s
whole.read = reading
train(whole, TrainOptions(), work=Path({work!r}))
"""


def test_killed_and_resumed_gives_the_same_file(models, tmp_path):
    model = models(arch="llama")
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT), model=str(model), work=str(tmp_path / "work"))], capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr
    files = [write_capsule(tmp_path / f"{i}.gguf", train(source(model, 8), TrainOptions(), work=w, **QUIET)).read_bytes() for i, w in enumerate([tmp_path / "work", None])]
    assert files[0] == files[1]


def test_a_full_disk_is_one_line(models, tmp_path):
    """A limit on the size of files stands for it; nothing is left under the capsule's name."""
    script = f"""
import resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from synthetic_kv import source
from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.writer import write_capsule
from kvcapsule_gguf.train.source import TrainError
from kvcapsule_gguf.train.trainer import TrainOptions, train

data, out = source(Path({str(models(arch="llama"))!r}), 8), Path({str(tmp_path / "c.gguf")!r})
capsule = train(data, TrainOptions(), say=lambda line: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for work in (lambda: train(data, TrainOptions(), work=Path({str(tmp_path / "work")!r}), say=lambda line: None), lambda: write_capsule(out, capsule)):
    try:
        work()
    except (TrainError, CapsuleError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("can not be written: " in line for line in lines), done.stdout + done.stderr
    assert not list(tmp_path.glob("c.gguf*"))


def test_one_line_when_it_can_not_train(models):
    good = source(models(arch="llama"), 4)
    bad = sample(good.model, 1)
    bad.keys[1][5, 0, 0] = np.nan
    for samples, options, reason in (
        ([], TrainOptions(), "no pictures"), (good.samples[:3], TrainOptions(), "too few"), ([*good.samples, bad], TrainOptions(), "layer 1.*finite"),
        (good.samples, TrainOptions(block=BlockShape(300)), "fewer tokens than a block"),
    ):  # fmt: skip
        with pytest.raises(TrainError, match=reason):
            train(ArraySource(good.model, samples), options, **QUIET)


# --- pictures ---


def test_drawn_pictures():
    """As many as asked for, the same for the same seed, different from each other."""
    a, b, c = ([p.image for p in Drawn(6, seed)] for seed in (0, 0, 1))
    assert len(a) == 6 and all(i.mode == "RGB" for i in a)
    assert [i.tobytes() for i in a] == [i.tobytes() for i in b] != [i.tobytes() for i in c]
    assert len({i.tobytes() for i in a}) == 6
    assert all(np.asarray(p.image).std() > 3 for p in Drawn(24, 3))
    assert [bool(p.questions) for p in Drawn(4, 0)] == [True, False, True, False]
    sizes = [p.image.size for p in Drawn(12, 0, any_size=True)]
    assert len(set(sizes)) == 12 and all(252 <= side <= 560 for size in sizes for side in size)


def test_a_folder_of_pictures(tmp_path):
    with pytest.raises(KVCapsuleError, match="not a folder"):
        list(from_folder(tmp_path / "none", 4, 0))
    with pytest.raises(KVCapsuleError, match="no pictures"):
        list(from_folder(tmp_path, 4, 0))
    (tmp_path / "sub").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "sub" / f"{i}.png")
    assert sorted(p.image.getpixel((0, 0))[0] for p in from_folder(tmp_path, 9, 0)) == [0, 1, 2]
    assert len(list(from_folder(tmp_path, 2, 0))) == 2
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UnreadablePicture, match="broken.jpg"):
        list(from_folder(tmp_path, 9, 0))
    said = []
    assert len(list(readable(from_folder(tmp_path, 9, 0), say=said.append))) == 3
    assert len(said) == 1 and "broken.jpg" in said[0]


# --- the command ---


def command(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kvcapsule_gguf.train", *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none.gguf", "--mmproj", "none.gguf"], "none.gguf is not a file"),
        ([__file__, "--mmproj", __file__, "--guard", "3"], "--guard 3.0 is not in 0.5..1"),
        ([__file__, "--mmproj", __file__], f"model '{__file__}': not a GGUF file"),
        ([__file__], f"no mmproj*.gguf beside {__file__}: name it with --mmproj"),
        ([__file__, "--mmproj", __file__, "--images", "none"], "none is not a folder"),
        ([__file__, "--mmproj", __file__, "--n-images", "2"], "--n-images 2 is too few: at least 4"),
        ([__file__, "--mmproj", __file__, "-o", "/none/out.gguf"], "/none is not a folder"),
        ([__file__, "--mmproj", __file__, "-o", __file__], f"capsule '{__file__}': is there already and is no capsule: choose another name, or remove it first"),
        ([__file__, "--mmproj", __file__, "-o", "/"], "capsule '/': is there already and is no capsule: choose another name, or remove it first"),
    ],
)
def test_the_command_refuses_with_one_line(arguments, line):
    done = command(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kvcapsule-train: error: {line}\n")


@pytest.mark.parametrize("shape", ["64", "raster:4", "tile:100x8", "tile:8"])
def test_a_block_that_is_none(shape):
    done = command(__file__, "--mmproj", __file__, "--block", shape)
    assert done.returncode == 2 and f"argument --block: {shape}" in done.stderr


def test_the_command_from_end_to_end(tmp_path):
    """A tiny model, a folder with a file that is no picture; retain and sensitivity; the file is what was asked for, and the state is gone."""
    from chat_model import write_mmproj, write_model

    lib = library("patched")
    model, mmproj = write_model(tmp_path / "tiny.gguf"), write_mmproj(tmp_path / "mmproj-tiny.gguf")
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        Image.effect_noise((64, 48), 30 + 30 * i).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "c.gguf"
    done = command(
        model, "--mmproj", mmproj, "-o", out, "--images", tmp_path / "pictures", "--block", "raster:16", "--codec", "retain", "--layers", "sensitivity", "--ratios", "0.5,0.8", "-c", 1024,
        "-t", 1, "--device", "cpu", OMP_NUM_THREADS="1", KVCAPSULE_LIB=str(lib),
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "skipped" in done.stderr and "broken.png" in done.stderr and "only 5 pictures" in done.stderr and " left" in done.stderr
    capsule = read_capsule(out)
    assert [t.name for t in capsule.tiers] == ["faithful", "ratio-0.5", "default"] and capsule.image_tokens == 16
    said = capsule.provenance
    assert (said["images"], said["layers"], said["images_from"]) == (5, "sensitivity", "folder")
    n = len(capsule.layers)
    assert len(said["key_error"]) == len(said["value_error"]) == 3 * n and len(said["key_sensitivity"]) == n
    assert min(said["key_sensitivity"].min(), said["value_sensitivity"].min()) > 0
    assert not (tmp_path / "c.gguf.work").exists()


def test_a_panorama_in_the_folder(tmp_path):
    """A picture that is one row of 143 tokens is trained on like the others, and the blocks stay tiles; what another command left behind is in nobody's way."""
    from chat_model import write_mmproj, write_model

    model, mmproj = write_model(tmp_path / "tiny.gguf", arch="qwen2vl"), write_mmproj(tmp_path / "mmproj-tiny.gguf", arch="qwen2vl")
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        Image.effect_noise((300, 300), 40 + 20 * i).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    Image.effect_noise((4004, 28), 60).convert("RGB").save(tmp_path / "pictures" / "panorama.png")
    out, state = tmp_path / "c.gguf", tmp_path / "c.gguf.work"
    state.mkdir()
    (state / "state.npz").write_bytes(b"of an earlier version")
    arguments = [model, "--mmproj", mmproj, "-o", out, "--images", tmp_path / "pictures", "-c", 2048, "-t", 1]
    done = command(*arguments, OMP_NUM_THREADS="1", KVCAPSULE_LIB=str(library("patched")))
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    capsule = read_capsule(out)
    assert (capsule.block_shape, capsule.block_width, capsule.provenance["images"]) == ("tile", 8, 6) and not state.exists()


@pytest.mark.parametrize("codec", ["pca", "retain"])
def test_training_needs_no_torch(tmp_path, codec):
    """Where torch cannot be imported a capsule is trained, and only --mlp says that it is needed."""
    from chat_model import write_mmproj, write_model

    model, _ = write_model(tmp_path / "tiny.gguf"), write_mmproj(tmp_path / "mmproj-tiny.gguf")
    for mlp, status in ((0, 0), (8, 1)) if codec == "retain" else ((0, 0),):
        out = tmp_path / f"c{mlp}.gguf"
        arguments = [model, "-o", out, "--n-images", 4, "--codec", codec, "--block", "raster:16", "-c", 1024, "-t", 1, "--mlp", mlp]
        code = f"import sys; sys.modules['torch'] = None; from kvcapsule_gguf.train.cli import main; sys.exit(main({[str(x) for x in arguments]!r}))"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "KVCAPSULE_LIB": str(library("patched"))}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout, out.exists()) == (status, "", not status), done.stderr
        assert ("the key MLP needs torch: pip install" in done.stderr) == bool(status) and "Traceback" not in done.stderr
    assert read_capsule(tmp_path / "c0.gguf").tiers[1].key_codec == [RETAIN if codec == "retain" else PCA] * 2


@pytest.mark.parametrize("arch", ["qwen2", "qwen2vl", "qwen3"])
def test_other_architectures(tmp_path, arch):
    """Trained and used: the evaluation loads the capsule and the default preset takes a fifth of the bytes."""
    import json

    from chat_model import write_mmproj, write_model

    env = {"OMP_NUM_THREADS": "1", "KVCAPSULE_LIB": str(library("patched"))}
    model, mmproj, out = write_model(tmp_path / "tiny.gguf", arch=arch), write_mmproj(tmp_path / "mmproj-tiny.gguf", arch=arch), tmp_path / "c.gguf"
    block = "tile:4x4" if arch == "qwen2vl" else "raster:16"
    size = ["--block", block, "-c", 1024, "-t", 1]
    done = command(model, "--mmproj", mmproj, "-o", out, "--n-images", 4, "--layers", "uniform", *size, **env)
    assert done.returncode == 0, done.stderr
    arguments = [model, "--capsule", out, "--ratio", "0.8", "--against", "f16", "-n", 4, "-c", 2048, "-t", 1, "--no-guard", "--json"]
    done = subprocess.run([sys.executable, "-m", "kvcapsule_gguf.eval", *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)["settings"][-1]
    assert read_capsule(out).block_shape == block.split(":")[0]
    assert ours["slots"]["economy"] > 0 and ours["kld"] < 0.1
    assert ours["kv_ratio"] == pytest.approx(0.8, abs=0.1 if arch == "qwen2vl" else 0.01)  # a remainder of less than half a block stays f16


@pytest.mark.parametrize("codec", ["pca", "retain"])
def test_the_command_on_the_demo_model(tmp_path, codec):
    lib = library("patched")
    demo = ROOT / "kvcapsule_gguf" / "demo"
    models = [p for p in sorted(demo.glob("*.gguf")) if not p.name.startswith(("mmproj", "kvcapsule"))]
    mmproj = sorted(demo.glob("mmproj*.gguf"))
    if not models or not mmproj:
        pytest.skip("no demo model")
    out = tmp_path / "c.gguf"
    done = command(models[0], "--mmproj", mmproj[0], "-o", out, "--n-images", 4, "--codec", codec, "--layers", "uniform", "-t", 1, OMP_NUM_THREADS="1", KVCAPSULE_LIB=str(lib))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    capsule = read_capsule(out)
    assert capsule.image_tokens == 576 and (capsule.block_shape, capsule.block_size, capsule.block_width) == ("tile", 64, 8)
    weight = np.stack([x.k_query_weight for x in capsule.layers])
    assert weight.std() > 0.05
    assert all(x.k_basis[0].std() < 0.1 for x in capsule.layers)  # the first row is near the mean over the tokens
