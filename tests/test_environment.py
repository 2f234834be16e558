"""A program that knows nothing of capsules gets them by its environment: LLAMA_KVCAPSULE and LLAMA_KVCAPSULE_HOT."""

from __future__ import annotations

import numpy as np
import pytest
from damages import F32, K, key, put, tensor
from llama_runner import Case, image, lossless_limit, nmse, stats, text

HOT, GRID = 256, (10, 16)
STEPS = [text(7), stats(), image(GRID, seed=1), stats(), text(5, seed=1), stats(), image(GRID, seed=2), text(6, seed=2, one_by_one=True), stats()]
ARCHS = ("llama", "qwen2vl")


def lines(log: list[str]) -> list[str]:
    return [line for line in log if "capsule" in line.lower()]


@pytest.mark.parametrize("arch", ARCHS)
def test_images_are_compressed(models, capsules, stock, patched, arch):
    model = models(arch=arch)
    env = {"LLAMA_KVCAPSULE": str(capsules(model)), "LLAMA_KVCAPSULE_HOT": str(HOT)}
    cases = [Case(str(fa), model, STEPS, flash_attn=fa) for fa in (False, True)]
    truth, ours = stock(cases), patched(cases, env=env)
    for fa in (False, True):
        assert nmse(ours[str(fa)].logits(), truth[str(fa)].logits()) <= lossless_limit(fa)
        assert all(ours[str(fa)].values("attached"))
        seen = ours[str(fa)].values("stats")
        # an image goes when text follows it
        assert [(s["n_cold"], s["n_hot_vision"], s["n_hot"]) for s in seen] == [(0, 0, HOT), (0, 160, HOT), (160, 0, HOT), (320, 0, HOT)]
        assert (seen[-1]["n_tiers"], seen[-1]["n_cold_tier"][0], seen[-1]["smaller"][0]) == (1, 320, 0.5)


def test_the_default_hot_size(models, capsules, patched):
    """Without LLAMA_KVCAPSULE_HOT a short context keeps all its cells hot."""
    model = models(arch="llama")
    ours = patched([Case("a", model, STEPS)], env={"LLAMA_KVCAPSULE": str(capsules(model))})["a"]
    seen = ours.values("stats")[-1]
    assert seen["n_hot"] == 1024 and seen["n_cold"] == 320


def test_hot_alone_is_off(models, stock, patched):
    case = Case("a", models(arch="llama"), [text(7), image((20, 30), seed=1), text(5, seed=1)])
    truth, ours = stock([case])["a"], patched([case], env={"LLAMA_KVCAPSULE_HOT": str(HOT)})["a"]
    assert np.array_equal(ours.logits(), truth.logits())


def test_another_model_runs_plain(models, capsules, stock, patched):
    """A draft model, say, in the process: one line, a plain cache of full size; the model that fits gets its capsule all the same."""
    fits, other = models(arch="llama"), models(arch="llama", seed=2)
    env = {"LLAMA_KVCAPSULE": str(capsules(fits)), "LLAMA_KVCAPSULE_HOT": str(HOT)}
    large = [text(7), image((20, 30), seed=1), text(5, seed=1), text(6, seed=2, one_by_one=True)]
    cases = [Case("plain", other, [*large, stats()]), Case("other kind", models(arch="qwen2"), [*large, stats()]), Case("capsule", fits, STEPS)]
    truth, ours = stock(cases), patched(cases, env=env)
    for name in ("plain", "other kind"):
        assert np.array_equal(ours[name].logits(), truth[name].logits())
        assert ours[name].values("attached") == [False]
        assert len(lines(ours[name].log)) == 1
    assert ours["capsule"].values("stats")[-1]["n_cold"] == 320


DAMAGED = {"NaN": tensor(K + "k_mean", put(np.nan, 0, 0)), "sizes": key("kvcapsule.smaller", lambda v: [0.0] * len(v), F32)}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_capsule_fails_at_once(models, capsules, patched, tmp_path, damage):
    model = models(arch="llama")
    bad = tmp_path / "bad.gguf"
    DAMAGED[damage](capsules(model), bad)
    result = patched([Case("a", model, STEPS)], env={"LLAMA_KVCAPSULE": str(bad)})["a"]
    assert "context creation failed" in result.error
    assert any(str(bad) in line or "capsule" in line for line in result.log)


def test_a_missing_capsule_fails_at_once(models, patched, tmp_path):
    """A misspelt path must not mean an uncompressed server."""
    result = patched([Case("a", models(arch="llama"), STEPS)], env={"LLAMA_KVCAPSULE": str(tmp_path / "no.gguf")})["a"]
    assert "context creation failed" in result.error


def test_the_api_wins(models, capsules, patched):
    """What a program asks for goes before its environment."""
    model = models(arch="llama")
    case = Case("a", model, STEPS, n_hot=512, auto_compress=True, capsule=capsules(model, tiers=(4, 8)))
    ours = patched([case], env={"LLAMA_KVCAPSULE": str(capsules(model)), "LLAMA_KVCAPSULE_HOT": str(HOT)})["a"]
    seen = ours.values("stats")[-1]
    assert (seen["n_tiers"], seen["n_hot"], seen["n_cold"]) == (2, 512, 320)


def test_auto_needs_no_file(models, patched):
    """A quality that anything holds takes the smallest tier, one that nothing holds leaves the images hot, and a ratio is one tier."""
    cases = [Case(name, models(arch="llama"), STEPS, env={"LLAMA_KVCAPSULE": "auto", **{f"LLAMA_KVCAPSULE_{k}": v for k, v in env.items()}})
             for name, env in {"small": {"QUALITY": "100"}, "none": {"QUALITY": "1e-9"}, "ratio": {"RATIO": "0.75"}}.items()]  # fmt: skip
    seen = {name: result.values("stats")[-1] for name, result in patched(cases).items()}
    assert {name: s["n_cold_tier"][:7] for name, s in seen.items()} == {"small": [320, *[0] * 6], "none": [0] * 7, "ratio": [0, 0, 0, 320, 0, 0, 0]}
    assert [s["n_tiers"] for s in seen.values()] == [7] * 3 and seen["none"]["n_hot_vision"] == 320
    assert all(s["bytes_tier"] == [s["bytes_slots"] * (n > 0) for n in s["n_cold_tier"]] for s in seen.values())


def test_two_images_without_text_between_them(models, patched):
    """On a line of positions they are one run, unless their size is known: then each is a grid of 8 x 8, 8 x 4, 4 x 8 and 4 x 4 tokens."""
    steps = [text(7), image((12, 12), seed=1), image((12, 12), seed=2), text(5, seed=1), stats()]
    cases = [Case(name, models(arch="llama"), steps, env={"LLAMA_KVCAPSULE": "auto", "LLAMA_KVCAPSULE_RATIO": "0.75", **env})
             for name, env in {"one run": {}, "two grids": {"LLAMA_KVCAPSULE_IMAGE_TOKENS": "144"}}.items()]  # fmt: skip
    seen = {name: result.values("stats")[-1] for name, result in patched(cases).items()}
    assert [s["n_cold"] for s in seen.values()] == [288, 288]
    slots = {name: sum(s["n_slots_tier"]) for name, s in seen.items()}
    assert slots["one run"] < slots["two grids"] == 8


def test_auto_leaves_other_models_alone(models, stock, patched):
    """Of an architecture that capsules are not tested with: a warning, and the plain cache."""
    model = models(arch="xverse")
    truth, ours = (run([Case("a", model, [text(7), text(6, one_by_one=True)])], **more)["a"] for run, more in ((stock, {}), (patched, {"env": {"LLAMA_KVCAPSULE": "auto"}})))
    assert np.array_equal(ours.logits(), truth.logits()) and len(lines(ours.log)) == 1


@pytest.mark.parametrize("env, line", [
    ({"QUALITY": "0.7", "RATIO": "0.8"}, "give one of them"),
    *[({"QUALITY": wrong}, f"LLAMA_KVCAPSULE_QUALITY={wrong} is not a number above 0 and up to 100") for wrong in ("-1", "0", "nan", "1e9", "0.5x")],
    *[({"RATIO": wrong}, f"LLAMA_KVCAPSULE_RATIO={wrong} is not a number above 0 and up to 1") for wrong in ("nan", "7", "0", "much")],
    ({"RATIO": "0.9"}, "the ratio 0.900 is above the largest of this capsule, 0.840 (6.26 times smaller)"),
    ({"HOT": "many"}, "LLAMA_KVCAPSULE_HOT=many is not a number above 0"),
])  # fmt: skip
def test_a_wrong_number_fails_at_once(models, patched, env, line):
    result = patched([Case("a", models(arch="llama"), STEPS)], env={"LLAMA_KVCAPSULE": "auto", **{f"LLAMA_KVCAPSULE_{k}": v for k, v in env.items()}})["a"]
    assert "context creation failed" in result.error and sum(line in x for x in result.log) == 1
