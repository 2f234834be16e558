"""The portable path (reconstruct, stock ggml ops) and the CPU's (unpack) give the same attention; reconstruct alone is lossless too.

LLAMA_KVCAPSULE_RECONSTRUCT=1 selects reconstruct, which is what every backend but the CPU runs.
"""

from __future__ import annotations

import pytest
from llama_runner import Case, compress, image, nmse, text
from test_lossless import CHAT, N, Script, check, label, settings
from test_lossless import both as run_both
from test_lossy import GRID, KINDS

RECONSTRUCT = {"LLAMA_KVCAPSULE_RECONSTRUCT": "1"}
# f32 sums in another order, then rounded to the type of the cache: an f16 or q8_0 code may flip; flash attention sums in f16
LIMIT = {("f16", False): 1e-6, ("f16", True): 1e-5, ("q8_0", True): 1e-4}
MANY = 24  # images: more slots than one chunk of the reconstruction


@pytest.fixture(scope="module")
def lossy(models, capsules, patched):
    steps = [text(7), image((8, 8), seed=1), compress(), text(6, seed=1), image((6, 10), seed=2), compress(), text(4, seed=2, one_by_one=True)]
    cases = []
    for kind, fa in GRID:
        k = KINDS[kind]
        capsule = capsules(models(k.model), block_size=N, lossless=False, **k.file)
        cases.append(Case(f"{kind}-{fa}", models(k.model), steps, flash_attn=fa, capsule=capsule, type_k=k.cache, type_v=k.cache))
    return patched(cases), patched(cases, env=RECONSTRUCT)


@pytest.mark.parametrize(("kind", "fa"), GRID)
def test_unpack_is_reconstruct(lossy, kind, fa):
    unpack, reconstruct = (r[f"{kind}-{fa}"] for r in lossy)
    assert nmse(unpack.logits(), reconstruct.logits()) <= LIMIT[KINDS[kind].cache, fa]


def test_the_paths_differ(lossy):
    """The switch does something: not every bit is the same."""
    assert any((a.logits() != lossy[1][name].logits()).any() for name, a in lossy[0].items())


SETTINGS = settings(heads=(64, 80))
SCRIPTS = {
    "pca": Script(CHAT),
    "retain": Script(CHAT, file={"key_codec": "retain", "mlp_width": 8, "neighbours": 4, "kept": 5}),
    "many": Script([s for i in range(MANY) for s in (image((4, 8), seed=i), compress(), text(2, seed=i))], {"n_ctx": 2048}),
}
LOSSLESS = [(s, script) for s in SETTINGS for script in SCRIPTS if script != "many" or s[1] == 64]


@pytest.fixture(scope="module")
def lossless(models, capsules, stock, patched):
    todo = {label(s, script): (s, SCRIPTS[script]) for s, script in LOSSLESS}
    return run_both(models, capsules, stock, lambda cases: patched(cases, env=RECONSTRUCT), todo)


@pytest.mark.parametrize(("setting", "script"), LOSSLESS, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_reconstruct_is_lossless(lossless, setting, script):
    check(lossless[label(setting, script)], setting[2], setting[3])
