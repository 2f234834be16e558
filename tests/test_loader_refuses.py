"""Damaged capsules, and those of other models, are refused with one line that names the reason, and the process goes on."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ROOT
from damages import STR, U32
from llama_runner import Case, StepResult, compress, image, load_capsule, stats, text
from make_capsule import old_capsule, random_capsule
from tile_damages import NEEDS_THE_MODEL, TILE_ACCEPTED, TILE_DAMAGES
from tiny_gguf import rewrite

from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule
from kvcapsule_gguf.train.fit_tiles import SMALLER

BOOL = gguf.GGUFValueType.BOOL


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def refusals(models, capsules, patched, folder) -> dict[str, StepResult]:
    """Loads all of them in one process, the good file before, between and after; then the good one is used."""
    model = models(arch="llama")
    good = capsules(model, tiers=(3, 4, 8))
    paths = {"good": good, "missing": folder / "missing.gguf", "a folder": folder, "format 1": old_capsule(folder / "old.gguf")}
    for name, damage in ({n: d for n, (d, _) in TILE_DAMAGES.items()} | TILE_ACCEPTED).items():
        paths[name] = folder / f"{name.replace(' ', '_')}.gguf"
        damage(good, paths[name])
    for name, other in {"another seed": models(arch="llama", seed=2), "another model": models(arch="qwen2"), "a model": None}.items():
        paths[name] = capsules(other) if other else model
    steps = [load_capsule(p) for p in paths.values()]
    result = patched([Case("load", model, [*steps, load_capsule(good)]),
                      Case("use", model, [text(5), image(32), compress(), text(5), stats()], capsule=good)])
    assert not result["load"].error and not result["use"].error
    assert result["use"].values("stats")[0]["n_cold"] == 32
    return {**dict(zip(paths, result["load"].steps)), "good again": result["load"].steps[-1]}


@pytest.mark.parametrize("name", ["good", "good again", *TILE_ACCEPTED])
def test_loads(refusals, name):
    assert refusals[name].values == {"loaded": True, "last_error": ""}


EARLIER = {"RoPE on fewer channels": "layer 0 has RoPE on 64 channels, the capsule on 30"}  # the model is looked at before the tensors
REASONS = {name: reason for name, (_, reason) in TILE_DAMAGES.items()} | EARLIER | {
    "format 1": "of format v1: train it anew with kvcapsule-train$", "missing": "open", "a folder": "capsule", "another seed": "fingerprint", "another model": "architecture", "a model": "capsule"}


@pytest.mark.parametrize("name", REASONS)
def test_refused_with_one_line(refusals, name):
    seen = refusals[name].values
    assert not seen["loaded"]
    line = seen["last_error"]
    assert line.strip() == line and line and len(line.splitlines()) == 1
    assert re.search(REASONS[name], line), line


@pytest.mark.parametrize("name", [n for n in TILE_DAMAGES if n not in NEEDS_THE_MODEL | EARLIER.keys()])
def test_both_readers_say_the_same(refusals, folder, name):
    with pytest.raises(CapsuleError) as e:
        read_tile_capsule(folder / f"{name.replace(' ', '_')}.gguf")
    assert refusals[name].values["last_error"] == str(e.value)


def test_every_quantization_fits(models, capsules, patched):
    """The fingerprint is that of the base, whatever the types of its weights."""
    from llama_runner import fingerprint

    capsule = capsules(models(arch="llama"))
    cases = [Case(t, models(arch="llama", dtype=t), [load_capsule(capsule), fingerprint()]) for t in ("f32", "f16", "q8_0")]
    done = patched([*cases, Case("other", models(arch="llama", seed=2), [fingerprint()])])
    assert all(done[t].steps[0].values["loaded"] for t in ("f32", "f16", "q8_0"))
    prints = {t: r.values("fingerprint")[0] for t, r in done.items()}
    assert len({prints[t] for t in ("f32", "f16", "q8_0")}) == 1 and prints["other"] != prints["f32"]
    assert all(re.fullmatch("[0-9a-f]{64}", p) for p in prints.values())


DEMO = ROOT / "kvcapsule_gguf" / "demo"
DEMOS = {model: model.with_name(f"kvcapsule-{model.stem.removesuffix('-F16')}.gguf") for model in (DEMO / "kvdemo-8M-v1-F16.gguf", DEMO / "mrope" / "kvdemo-mrope-8M-v1-F16.gguf")}


def test_the_bundled_capsules(patched):
    """Each is for its model and not for the other."""
    cases = [Case(model.stem, model, [load_capsule(DEMOS[model]), load_capsule(other)], n_ctx=64) for model, other in zip(DEMOS, reversed(DEMOS.values()))]
    for case, result in patched(cases).items():
        own, other = (s.values for s in result.steps)
        assert own == {"loaded": True, "last_error": ""}, case
        assert not other["loaded"] and "was made for another model" in other["last_error"]
    assert all(read_tile_capsule(path).smaller == pytest.approx(SMALLER, rel=0.01) for path in DEMOS.values())


def test_a_file_for_another_model(models, patched, folder):
    """What only the model tells, in the order of the checks."""
    model = models(arch="llama")
    good = random_capsule(model, folder / "tiles.gguf", tiers=[4])
    changes = {
        "architecture": {"kvcapsule.base.architecture": ("qwen2", STR), "general.architecture": ("qwen2", STR)},
        "3 layers, not 2": {"kvcapsule.base.block_count": (3, U32)},
        "RoPE type neox": {"kvcapsule.base.rope.type": ("neox", STR)},
        "layer 0 is with RoPE": {"kvcapsule.layer_rope": ([False, True], BOOL)},
        "layer 0 has RoPE on 64 channels, the capsule on 62": {"kvcapsule.base.rope.dimension_count": (62, U32)},
        "fingerprint": {"kvcapsule.base.fingerprint": ("0" * 64, STR)},
    }
    paths = [rewrite(good, folder / f"tiles-{i}.gguf", kv=kv) for i, kv in enumerate(changes.values())]
    heads, size = (random_capsule(models(arch="llama", **other), folder / f"{name}.gguf") for name, other in (("heads", {"n_head_kv": 1}), ("size", {"head": 32})))
    result = patched([Case("a", model, [load_capsule(p) for p in (good, *paths, heads, size)], n_ctx=64)])["a"]
    first, *others = (s.values for s in result.steps)
    assert first == {"loaded": True, "last_error": ""}
    for reason, seen in zip([*changes, "layer 0 has 2 KV heads, the capsule 1", "head size of layer 0"], others, strict=True):
        assert not seen["loaded"] and f"was made for another model: {reason}" in seen["last_error"]


@pytest.mark.parametrize("layers", ["all", "0"])
@pytest.mark.parametrize("bundled", [True, False])
def test_a_mean_that_overflows_with_what_is_added_to_it(models, capsules, patched, folder, bundled, layers):
    """f16 just holds 65504. With a whole mean of that, answers became NaN; both readers refuse it with the same line."""
    model, good = next(iter(DEMOS.items())) if bundled else (models(arch="llama"), capsules(models(arch="llama"), tiers=(4,)))
    bad = folder / f"mean-{bundled}-{layers}.gguf"
    means = [t.name for t in gguf.GGUFReader(good).tensors if t.name.endswith(".v_mean")]
    rewrite(good, bad, tensors={n: lambda a: np.full_like(a, 65504) for n in (means if layers == "all" else means[:1])})
    fine, refused = (s.values for s in patched([Case("a", model, [load_capsule(good), load_capsule(bad)], n_ctx=64)])["a"].steps)
    assert fine == {"loaded": True, "last_error": ""}
    with pytest.raises(CapsuleError) as e:
        read_tile_capsule(bad)
    line = f"capsule '{bad}': tensor blk.0.kvcapsule.v_mean has values beyond +-8192: keys and values could overflow f16"
    assert refused == {"loaded": False, "last_error": line} and str(e.value) == line
