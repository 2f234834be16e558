"""Damaged capsules, and those of other models, are refused with one line that names the reason, and the process goes on."""

from __future__ import annotations

import re

from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ROOT
from damages import ACCEPTED, DAMAGES, NEEDS_THE_MODEL, RETAIN_DAMAGES, N
from llama_runner import Case, StepResult, compress, image, load_capsule, stats, text
from tiny_gguf import rewrite

from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.reader import read_capsule
from kvcapsule_gguf.format.tile_capsule import read_any_capsule

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def refusals(models, capsules, patched, folder) -> dict[str, StepResult]:
    """Loads all of them in one process, the good file before, between and after; then the good one is used."""
    model = models(arch="llama")
    good = capsules(model, block_size=N)
    paths = {"good": good, "missing": folder / "missing.gguf", "a folder": folder}
    retain = capsules(model, block_size=N, key_codec="retain", mlp_width=8)
    damages = [(good, n, d) for n, (d, _) in DAMAGES.items()] + [(retain, n, d) for n, (d, _) in RETAIN_DAMAGES.items()]
    for source, name, damage in damages + [(good, n, d) for n, d in ACCEPTED.items()]:
        paths[name] = folder / f"{name.replace(' ', '_')}.gguf"
        damage(source, paths[name])
    for name, other in {"another seed": models(arch="llama", seed=2), "another model": models(arch="qwen2"), "a model": None}.items():
        paths[name] = capsules(other, block_size=N) if other else model
    steps = [load_capsule(p) for p in paths.values()]
    result = patched([Case("load", model, [*steps, load_capsule(good)]),
                      Case("use", model, [text(5), image(2 * N), compress(), text(5), stats()], capsule=good)])
    assert not result["load"].error and not result["use"].error
    assert result["use"].values("stats")[0]["n_cold"] == 2 * N
    return {**dict(zip(paths, result["load"].steps)), "good again": result["load"].steps[-1]}


@pytest.mark.parametrize("name", ["good", "good again", *ACCEPTED.keys()])
def test_loads(refusals, name):
    assert refusals[name].values == {"loaded": True, "last_error": ""}


REASONS = {name: reason for name, (_, reason) in (DAMAGES | RETAIN_DAMAGES).items()} | {
    "missing": "open", "a folder": "capsule", "another seed": "fingerprint", "another model": "architecture", "a model": "capsule"}


@pytest.mark.parametrize("name", REASONS)
def test_refused_with_one_line(refusals, name):
    seen = refusals[name].values
    assert not seen["loaded"]
    line = seen["last_error"]
    assert line.strip() == line and line and len(line.splitlines()) == 1
    assert re.search(REASONS[name], line), line


@pytest.mark.parametrize("name", [n for n in DAMAGES | RETAIN_DAMAGES if n not in NEEDS_THE_MODEL])
def test_both_readers_say_the_same(refusals, folder, name):
    with pytest.raises(CapsuleError) as e:
        read_any_capsule(folder / f"{name.replace(' ', '_')}.gguf")
    assert refusals[name].values["last_error"] == str(e.value)


def test_every_quantization_fits(models, capsules, patched):
    """The fingerprint is that of the base, whatever the types of its weights."""
    from llama_runner import fingerprint

    capsule = capsules(models(arch="llama"), block_size=N)
    cases = [Case(t, models(arch="llama", dtype=t), [load_capsule(capsule), fingerprint()]) for t in ("f32", "f16", "q8_0")]
    done = patched([*cases, Case("other", models(arch="llama", seed=2), [fingerprint()])])
    assert all(done[t].steps[0].values["loaded"] for t in ("f32", "f16", "q8_0"))
    prints = {t: r.values("fingerprint")[0] for t, r in done.items()}
    assert len({prints[t] for t in ("f32", "f16", "q8_0")}) == 1 and prints["other"] != prints["f32"]
    assert all(re.fullmatch("[0-9a-f]{64}", p) for p in prints.values())


@pytest.mark.parametrize("layers", ["all", "0"])
@pytest.mark.parametrize("bundled", [True, False])
def test_a_mean_that_overflows_with_what_is_added_to_it(models, capsules, patched, folder, bundled, layers):
    """f16 just holds 65504. With a whole mean of that, answers became NaN; both readers refuse it with the same line."""
    demo = ROOT / "kvcapsule_gguf" / "demo"
    model, good = (demo / "kvdemo-8M-v1-F16.gguf", demo / "kvcapsule-kvdemo-8M-v1.gguf") if bundled else (models(arch="llama"), capsules(models(arch="llama"), block_size=N, lossless=False))
    bad = folder / f"mean-{bundled}-{layers}.gguf"
    means = [t.name for t in gguf.GGUFReader(good).tensors if t.name.endswith(".v_mean")]
    rewrite(good, bad, tensors={n: lambda a: np.full_like(a, 65504) for n in (means if layers == "all" else means[:1])})
    fine, refused = (s.values for s in patched([Case("a", model, [load_capsule(good), load_capsule(bad)], n_ctx=64)])["a"].steps)
    assert fine == {"loaded": True, "last_error": ""}
    with pytest.raises(CapsuleError) as e:
        read_capsule(bad)
    line = f"capsule '{bad}': tensor blk.0.kvcapsule.v_mean has values beyond +-8192: keys and values could overflow f16"
    assert refused == {"loaded": False, "last_error": line} and str(e.value) == line
