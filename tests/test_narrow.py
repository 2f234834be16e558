"""Heads that see no other image while an image is read, against a dense model with the same rule (dense_model.py), and where they must change nothing."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from dense_model import DenseModel
from llama_runner import Case, Step, cells, compress, image, nmse, seq_cp, seq_rm, set_pos, state_load, state_save, stats, text

FULL, AUTO, MEASURE = 0, 1, 2
GRID, TOKENS = (4, 6), 24  # of every image, so that images of plain positions may follow each other
HEADS = {
    "all": [[1, 1], [1, 1]], "one layer": [[1, 1], []], "first head": [[1, 0], [1, 0]], "some": [[0, 1], [1, 1]],
}  # fmt: skip
ARCHS = ("llama", "qwen2", "qwen2vl")
# an f32 cache without flash attention rounds nothing, flash attention sums in f16
SETTINGS = [("f32", False, 1e-9), ("f16", False, 1e-5), ("f16", True, 3e-5)]


def script(seed: int, n: int = 9) -> list[Step]:
    """Texts, images, forks, removals and saved states in two sequences; text ends it in both."""
    rng = np.random.default_rng(seed)
    steps: list[Step] = [text(3, seed=1), image(GRID, seed=1), text(2, seed=2), image(GRID, seed=2)]
    forked, saved = False, False
    for i in range(n):
        seq = int(rng.integers(0, 2)) if forked else 0
        kind = rng.choice(["image", "image", "text", "fork", "remove", "save", "compress"])
        if kind == "image":
            steps.append(image(GRID, seed=10 * seed + i, seq=seq))
        elif kind == "text":
            steps.append(text(int(rng.integers(1, 6)), seed=i, seq=seq))
        elif kind == "fork" and not forked:
            steps.append(seq_cp(0, 1))
            forked = True
        elif kind == "remove":
            p0 = int(rng.integers(1, 40))
            steps.append(seq_rm(seq, p0, p0 + int(rng.integers(1, 30))))
        elif kind == "save" and not saved:
            steps += [state_save("a", 0), state_load("a", 0)]
            saved = True
        elif kind == "compress":
            steps.append(compress(seq))
    return [*steps, text(5, seed=3), *([text(4, seed=4, seq=1)] if forked else [])]


def dense(path: Any, heads: list[list[int]], steps: list[Step]) -> tuple[np.ndarray, int]:
    model = DenseModel(path, np.array([h or [0, 0] for h in heads]))
    logits = []
    for s in steps:
        if s["op"] == "text":
            logits.append(model.text(s["tokens"], s["seq"]))
        elif s["op"] == "image":
            model.image(s["h"], s["w"], s["seed"], s["seq"])
        elif s["op"] == "seq_cp":
            model.seq_cp(s["src"], s["dst"])
        elif s["op"] == "seq_rm":
            model.seq_rm(s["seq"], s["p0"], s["p1"])
    return np.concatenate(logits), model.narrowed


def case(name: str, model: Any, steps: list[Step], **options: Any) -> Case:
    return Case(name, model, steps, **{"image_tokens": TOKENS, "n_seq_max": 2, "image_attention": AUTO, "auto_compress": True} | options)


RUNS = [(arch, seed, heads) for arch in ARCHS for seed, heads in enumerate(HEADS, 1)]


@pytest.fixture(scope="module")
def runs(models, capsules, patched):
    cases = []
    for (arch, seed, heads), (kind, fa, _), ubatch in product(RUNS, SETTINGS, (512, 16)):
        model = models(arch=arch)
        capsule = capsules(model, narrow=tuple(map(tuple, HEADS[heads])))
        steps = [*script(seed), stats()]
        cases.append(case(f"{arch}-{seed}-{kind}-{fa}-{ubatch}", model, steps, capsule=capsule, type_k=kind, type_v=kind, flash_attn=fa, n_ubatch=ubatch, auto_compress=seed % 2 == 0))
    return patched(cases)


@pytest.mark.parametrize(("arch", "seed", "heads"), RUNS, ids=str)
def test_random_images_forks_and_removals(runs, models, arch, seed, heads):
    truth, n = dense(models(arch=arch), HEADS[heads], script(seed))
    everything, _ = dense(models(arch=arch), [[], []], script(seed))
    assert n > 0 and nmse(everything, truth) > 1e-3  # the rule counts
    for (kind, fa, limit), ubatch in product(SETTINGS, (512, 16)):
        ours = runs[f"{arch}-{seed}-{kind}-{fa}-{ubatch}"]
        assert nmse(ours.logits(), truth) <= limit, (kind, fa, ubatch)
        seen = ours.values("stats")[-1]
        assert (seen["n_heads"], seen["n_heads_narrow"]) == (4, sum(map(sum, HEADS[heads])))
        assert seen["n_tokens_narrow"] > 0


def test_what_all_heads_would_lose(models, capsules, patched):
    """The mode for training: everything as with full attention, and beside it what attention gives without the other images."""
    model, steps = models(arch="qwen2vl"), [text(4), image(GRID, seed=1), text(3, seed=1), image(GRID, seed=2), text(5, seed=2)]
    options = {"type_k": "f32", "type_v": "f32", "auto_compress": False, "dump": "kqv_(narrow|out)-.*"}
    modes = {"full": ((), FULL), "all": (((1, 1), ()), AUTO), "measure": ((), MEASURE)}
    found = patched([case(name, model, steps, capsule=capsules(model, narrow=heads), image_attention=mode, **options) for name, (heads, mode) in modes.items()])
    assert np.array_equal(found["measure"].logits(), found["full"].logits())
    step = {name: r.steps[3] for name, r in found.items()}
    names = [[t[0] for t in s.values["tensors"]] for s in step.values()]
    assert names == [["kqv_out-0", "kqv_out-1"]] * 2 + [["kqv_narrow-0", "kqv_out-0", "kqv_narrow-1", "kqv_out-1"]]
    full, narrowed, measured = (s.arrays for s in step.values())
    assert np.array_equal(measured["tensor1"], full["tensor0"])
    assert nmse(measured["tensor0"], narrowed["tensor0"]) <= 1e-12 < nmse(measured["tensor1"], measured["tensor0"])
    assert all("kqv_narrow-0" not in dict(t[:2] for t in found["measure"].steps[i].values["tensors"]) for i in (0, 1, 2, 4))


# --- where nothing changes ---


def test_no_head_is_named_or_none_is_asked_for(models, capsules, patched):
    model, steps = models(arch="qwen2vl"), [*script(3), stats()]
    named, plain = capsules(model, narrow=((1, 1), (1, 1))), capsules(model)
    found = patched([case("asked", model, steps, capsule=plain), case("full", model, steps, capsule=named, image_attention=FULL), case("plain", model, steps, capsule=plain, image_attention=FULL)])
    for name in ("asked", "full"):
        assert np.array_equal(found[name].logits(), found["plain"].logits())
        assert found[name].values("stats")[-1]["n_tokens_narrow"] == 0


def test_the_first_image_is_read_as_the_stock_library_does(models, capsules, patched, stock):
    model, steps = models(arch="llama"), [text(4), image(GRID, seed=1), text(5, seed=2)]
    ours = patched([case("a", model, [*steps, stats()], capsule=capsules(model, narrow=((1, 1), (1, 1))), auto_compress=False)])["a"]
    assert np.array_equal(ours.logits(), stock([Case("a", model, steps, n_seq_max=2)])["a"].logits())
    assert ours.values("stats")[-1]["n_tokens_narrow"] == 0


def test_two_images_in_one_batch(models, capsules, patched):
    """Each sees itself alone, also where a batch ends inside of one."""
    model, one = models(arch="llama"), [text(4), image((2, 12), seed=1), image((2, 12), seed=2), text(5, seed=2)]
    both = [text(4), cells([[4 + i, 0, 0, 1 + i // TOKENS, i % TOKENS, TOKENS] for i in range(2 * TOKENS)]), set_pos(0, 4 + 2 * TOKENS), text(5, seed=2)]
    capsule = capsules(model, narrow=((1, 1), (1, 1)))
    options = {"capsule": capsule, "type_k": "f32", "type_v": "f32", "auto_compress": False}
    found = patched([case("one", model, one, **options), *(case(str(n), model, [*both, stats()], n_ubatch=n, **options) for n in (512, 16))])
    for n in ("512", "16"):
        assert nmse(found[n].logits(), found["one"].logits()) <= 1e-9
        assert found[n].values("stats")[-1]["n_tokens_narrow"] >= TOKENS


def test_embeddings_one_by_one_see_everything(models, capsules, patched):
    """With M-RoPE each has a position of its own: audio, or a text's embeddings."""
    model = models(arch="qwen2vl")
    steps = [text(4), image(GRID, seed=1), *[image((1, 1), seed=i) for i in range(4)], text(5, seed=2)]
    options = {"capsule": capsules(model, narrow=((1, 1), (1, 1))), "auto_compress": False}
    found = patched([case("narrow", model, [*steps, stats()], **options), case("full", model, steps, image_attention=FULL, **options)])
    assert np.array_equal(found["narrow"].logits(), found["full"].logits())
    assert found["narrow"].values("stats")[-1]["n_tokens_narrow"] == 0


def test_a_model_with_layers_of_other_kinds_sees_everything(models, capsules, patched):
    model, steps = models(arch="gemma3"), [text(4), image(64, seed=1), text(3, seed=1), image(64, seed=2), text(5, seed=2)]
    capsule = capsules(model, narrow=((1, 1),) * 8)
    found = patched([case("narrow", model, [*steps, stats()], capsule=capsule, image_tokens=64), case("full", model, steps, capsule=capsule, image_tokens=64, image_attention=FULL)])
    assert np.array_equal(found["narrow"].logits(), found["full"].logits())
    assert found["narrow"].values("stats")[-1]["n_heads_narrow"] == 0
    assert any("image attention is full: a model with layers of other kinds" in line for line in found["narrow"].log)


@pytest.mark.parametrize(("value", "narrow"), [("auto", True), ("full", False), ("", False)])
def test_the_environment(models, capsules, patched, value, narrow):
    model = models(arch="llama")
    env = {"LLAMA_KVCAPSULE": str(capsules(model, narrow=((1, 1), (1, 1)))), "LLAMA_KVCAPSULE_IMAGE_ATTENTION": value}
    steps = [text(4), image(GRID, seed=1), text(3, seed=1), image(GRID, seed=2), text(2), stats()]
    seen = patched([Case("a", model, steps, env=env)])["a"].values("stats")[-1]
    assert (seen["n_heads_narrow"], seen["n_tokens_narrow"]) == ((4, TOKENS) if narrow else (0, 0))


def test_the_environment_is_checked(models, patched):
    env = {"LLAMA_KVCAPSULE": "auto", "LLAMA_KVCAPSULE_IMAGE_ATTENTION": "narrow"}
    assert "LLAMA_KVCAPSULE_IMAGE_ATTENTION=narrow is neither auto nor full" in "".join(patched([Case("a", models(arch="llama"), env=env)])["a"].log)
