"""The portable path (reconstruct, stock ggml ops) and those of the CPU (unpack, fused) give the same attention; each alone is lossless.

LLAMA_KVCAPSULE_PATH selects one; reconstruct is what every backend but the CPU runs, fused the default of the CPU, which test_lossless runs.
LLAMA_KVCAPSULE_SIMD=0 selects plain C++: sums of floats instead of products in 8 bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from llama_runner import Case, compress, image, image_file, lossless_limit, nmse, read_kv, rounded_limit, state_load, state_save, stats, text
from test_lossless import CHAT, N, Script, both as run_both, label, mean, settings
from test_lossy import GRID, KINDS, wild
from tiny_gguf import TinyModel

RECONSTRUCT = {"LLAMA_KVCAPSULE_PATH": "reconstruct"}
UNPACK = {"LLAMA_KVCAPSULE_PATH": "unpack"}
FUSED = {"LLAMA_KVCAPSULE_PATH": "fused"}
OP = {"LLAMA_KVCAPSULE_PATH": "op"}  # GGML_OP_CAPSULE, on the CPU its reference
PLAIN = {"LLAMA_KVCAPSULE_SIMD": "0"}
MANY = 24  # images: more slots than one chunk of the reconstruction


PATHS = {"reconstruct": RECONSTRUCT | PLAIN, "reconstruct, 8 bits": RECONSTRUCT, "unpack": UNPACK | PLAIN, "unpack, 8 bits": UNPACK, "fused": FUSED | PLAIN, "fused, 8 bits": FUSED, "op": OP | PLAIN, "op, 8 bits": OP}
FIRST = 7 + 6  # logits that know one image only: its slots are the same bytes on every path with the same kernels (the op has its own)
SECOND = 5e-3  # the second image was computed with the first in view, so that some codes of its slots are the next ones: a random model makes much of that


def limit(path: str, cache: str, fa: bool) -> float:
    """NMSE of logits against reconstruct. The usual attention rounds queries and weights to the type of the cache and with flash attention sums in f16."""
    if "8 bits" in path:
        return 3e-4  # of random rows; test_lossy holds attention itself to 1e-4
    if path == "unpack":
        return 1e-7
    return 1.5e-4 if cache == "q8_0" else 3e-6 if fa else 3e-7


@pytest.fixture(scope="module")
def lossy(models, capsules, patched):
    steps = [text(7), image((8, 8), seed=1), compress(), text(6, seed=1), image((6, 10), seed=2), compress(), text(4, seed=2, one_by_one=True)]
    cases = []
    for kind, fa in GRID:
        k = KINDS[kind]
        capsule = capsules(models(k.model), block_size=N, lossless=False, **k.file)
        cases.append(Case(f"{kind}-{fa}", models(k.model), steps, flash_attn=fa, capsule=capsule, type_k=k.cache, type_v=k.cache))
    return {path: patched(cases, env=env) for path, env in PATHS.items()}


@pytest.mark.parametrize("path", [p for p in PATHS if not p.startswith("reconstruct")])
@pytest.mark.parametrize(("kind", "fa"), GRID)
def test_the_cpu_is_reconstruct(lossy, kind, fa, path):
    reference = "reconstruct" + ", 8 bits" * ("8 bits" in path)  # images are compressed with the same kernels
    ours, reconstruct = (lossy[p][f"{kind}-{fa}"].logits() for p in (path, reference))
    # the first key of a slot is stored as it is attended to: its values lie halfway between two codes of a q8_0 scratch
    halfway = kind == "retain, q8_0 cache" and path == "unpack"
    assert nmse(ours[:FIRST], reconstruct[:FIRST]) <= (1e-5 if halfway else limit(path, KINDS[kind].cache, fa))
    assert nmse(ours, reconstruct) <= SECOND


def test_the_paths_differ(lossy):
    """The switches do something: not every bit is the same."""
    for path in PATHS:
        for other in PATHS:
            assert path == other or any((a.logits() != lossy[other][name].logits()).any() for name, a in lossy[path].items())


SETTINGS = settings(heads=(64, 80))
SCRIPTS = {
    "pca": Script(CHAT),
    "retain": Script(CHAT, file={"key_codec": "retain", "mlp_width": 8, "neighbours": 4, "kept": 5}),
    "many": Script([s for i in range(MANY) for s in (image((4, 8), seed=i), compress(), text(2, seed=i))], {"n_ctx": 2048}),
}
LOSSLESS = [(s, script) for s in SETTINGS for script in SCRIPTS if script != "many" or s[1] == 64]


@pytest.fixture(scope="module", params=["reconstruct", "unpack", "op"])
def path(request):
    return request.param


@pytest.fixture(scope="module")
def lossless(path, models, capsules, stock, patched):
    todo = {label(s, script): (s, SCRIPTS[script]) for s, script in LOSSLESS}
    return run_both(models, capsules, stock, lambda cases: patched(cases, env={"LLAMA_KVCAPSULE_PATH": path}), todo)


@pytest.mark.parametrize(("setting", "script"), LOSSLESS, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_lossless(lossless, path, setting, script):
    """Before the usual attention, or (op) with attention in f32."""
    pair = lossless[label(setting, script)]
    assert nmse(pair[1].logits(), pair[0].logits()) <= (lossless_limit if path == "op" else rounded_limit)(setting[2], setting[3])


def test_the_mean(lossless, path):
    """Of all cases without flash attention."""
    if path == "op":
        pytest.skip("attention in f32: what is seen is the rounding of stock, and that case by case")
    assert mean(lossless) <= 1e-9


@pytest.mark.parametrize(("name", "known"), [("LLAMA_KVCAPSULE_PATH", "reconstruct host unpack fused op"), ("LLAMA_KVCAPSULE_SIMD", "0 plain")])
def test_a_switch_that_is_not_there(models, capsules, patched, name, known):
    model = models()
    case = Case("a", model, [text(3)], capsule=capsules(model, block_size=N))
    plain, odd = (patched([case], env=env)["a"] for env in ({}, {name: "fast"}))
    assert any(f"{name}=fast is ignored, there are: {known}" in line for line in odd.log) and not any("is ignored" in line for line in plain.log)
    assert (odd.logits() == plain.logits()).all()


def test_a_cache_that_the_op_does_not_know(models, capsules, patched):
    """One line, and the layers take another path."""
    model = models()
    case = Case("a", model, CHAT, capsule=capsules(model, block_size=N), type_k="bf16")
    plain, op = (patched([case], env=env)["a"] for env in ({}, OP))
    assert len([line for line in op.log if "lacks GGML_OP_CAPSULE" in line]) == 1 and not any("lacks" in line for line in plain.log)
    assert (op.logits() == plain.logits()).all()


COMPRESSED = {  # kappa: some blocks are refused
    "graded": 25, "graded, M-RoPE": 28, "graded, q8_0 cache": 25, "one of each": 200,
    "retain, residuals": 180, "retain, M-RoPE": 30, "retain, q8_0 cache": 30, "retain, MLP": 30, "10 layers": 40,
}  # fmt: skip
COMPRESSED_KINDS = KINDS | {
    "retain, M-RoPE": replace(KINDS["retain, q8_0 cache"], model=TinyModel("qwen2vl"), cache="f16"),
    "10 layers": replace(KINDS["graded"], model=TinyModel("llama", n_layer=10)),  # two graphs
}


def test_images_are_compressed_by_the_op(models, capsules, patched, tmp_path):
    """The same tiers as on the host and the same slots, but for a few codes; a state with them is read. The picture has a remainder, which becomes a padded slot."""
    h, w = 12, 26
    picture = image_file(wild(tmp_path / "wild.npy", 256, h * w, 3), h, w)
    cases = []
    for name, kappa in COMPRESSED.items():
        k = COMPRESSED_KINDS[name]
        reads = [read_kv(il) for il in range(k.model.n_layer)]
        steps = [picture, *reads, compress(), stats(), *reads, state_save("s"), state_load("s")]
        capsule = capsules(models(k.model), block_size=N, lossless=False, kappa=kappa, **k.file)
        cases.append(Case(name, models(k.model), steps, capsule=capsule, guard=True, type_k=k.cache, type_v=k.cache, flash_attn=k.cache != "f16"))
    host, op = (patched(cases, env=env) for env in (UNPACK, OP))
    for name in COMPRESSED:
        assert not host[name].error and not op[name].error
        by_op = [sum("compressed by GGML_OP_CAPSULE" in line for step in done[name].steps for line in step.log) for done in (host, op)]
        assert by_op[0] == 0 and by_op[1] >= 2, name  # economy, then faithful
        economy, faithful = op[name].values("stats")[0]["n_slots"]
        assert [economy, faithful] == host[name].values("stats")[0]["n_slots"] and economy > 1 and faithful > 1, name
        layers = COMPRESSED_KINDS[name].model.n_layer
        for il in range(layers):
            for x in "kv":
                before, hot = (done[name].steps[1 + il].arrays[x] for done in (host, op))
                wanted, ours = (done[name].steps[3 + layers + il].arrays[x] for done in (host, op))
                assert np.array_equal(before, hot)
                assert nmse(ours, wanted) <= 1e-3 * nmse(wanted, before)
