"""Slots in a graph: attention on them, unpacked before the usual attention, and unpacked in host memory for a device are the same.

What a slot holds is tested elsewhere; here all paths read the same slots, and each alone is lossless. LLAMA_KVCAPSULE_PATH=unpack and host select the others.
"""

from __future__ import annotations

import numpy as np
import pytest
from llama_runner import Case, compress, image, nmse, rounded_limit, seq_add, seq_cp, seq_rm, state_load, state_save, stats, text, together
from test_lossless import CHAT as LOSSLESS_CHAT, Script, both, label, mean, settings
from tiny_gguf import TinyModel

UNPACK, HOST = ({"LLAMA_KVCAPSULE_PATH": path} for path in ("unpack", "host"))
BEFORE, AFTER = 7, 6
FIRST = BEFORE + AFTER  # logits that know one image only: its slots are the same bytes on every path
LONG = 260  # tokens: more than attention on slots takes
KERNELS = 3e-4  # NMSE of logits: integer kernels, on random values
SECOND = 5e-3  # the second image was computed with the first in view, so that some of its codes are the next ones
LIMITS = {"q4_0": 0.03, "q8_0": 1e-3}  # what is unpacked has the type of the cache

CHAT = [text(BEFORE), image((12, 9), seed=1), compress(), text(AFTER, seed=1), image((5, 17), seed=2), compress(), stats(),
        text(4, seed=2, one_by_one=True), text(LONG, seed=3), text(2, seed=4)]  # fmt: skip
MODELS = {
    **{arch: TinyModel(arch) for arch in ("llama", "qwen2", "qwen2vl", "qwen3vl", "phi3", "gemma2", "gemma3", "smollm3", "deci")},
    **{f"head {head}": TinyModel("llama", head=head) for head in (80, 96, 128, 512)},
    "one KV head": TinyModel("qwen2", n_head=8, n_head_kv=1),
    "no groups": TinyModel("qwen2", n_head=4, n_head_kv=4),
}
CACHES = {"f16": ("f16", True), "f16, no FA": ("f16", False), "f32, no FA": ("f32", False), "bf16": ("bf16", True), "q8_0": ("q8_0", True), "q4_0": ("q4_0", True)}
ALL = [(model, cache) for model in MODELS for cache in CACHES if model in ("llama", "qwen2vl") or cache in ("f16", "f32, no FA")]
ALL = [(model, cache) for model, cache in ALL if not (model == "head 80" and cache.startswith("q"))]


def cases(models, steps=CHAT, which=ALL, **options) -> list[Case]:
    out = []
    for model, cache in which:
        type_, fa = CACHES[cache]
        out.append(Case(f"{model}, {cache}", models(MODELS[model]), steps, flash_attn=fa, type_k=type_, type_v=type_, capsule="auto", ratio=0.75,
                        image_causal=model != "gemma3", n_ctx=1024, **options))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def results(models, patched):
    return {name: patched(cases(models), env=env) for name, env in {"attend": {}, "unpack": UNPACK, "host": HOST}.items()}


@pytest.mark.parametrize(("model", "cache"), ALL)
def test_attention_on_slots_is_attention_on_what_they_hold(results, model, cache):
    name = f"{model}, {cache}"
    ours, unpacked = (results[path][name] for path in ("attend", "unpack"))
    assert ours.error == unpacked.error == ""
    assert nmse(ours.logits()[:FIRST], unpacked.logits()[:FIRST]) <= LIMITS.get(cache, KERNELS)
    assert nmse(ours.logits(), unpacked.logits()) <= max(LIMITS.get(cache, 0), SECOND)


@pytest.mark.parametrize(("model", "cache"), ALL)
def test_host_memory_makes_no_difference(results, model, cache):
    name = f"{model}, {cache}"
    assert (results["host"][name].logits() == results["unpack"][name].logits()).all()


def test_the_paths_differ(results):
    """The switch does something."""
    assert any((a.logits() != results["unpack"][name].logits()).any() for name, a in results["attend"].items())


SHIFTED = {
    "a part of a tile is gone": [text(BEFORE), image((12, 9), seed=1), compress(), seq_rm(0, BEFORE + 3, BEFORE + 6), text(AFTER, seed=1)],
    "all that follows moves": [text(BEFORE), text(4, seed=5), image((12, 9), seed=1), compress(), seq_rm(0, BEFORE, BEFORE + 4),
                               seq_add(0, BEFORE + 4, -1, -4), text(AFTER, seed=1)],
    "a part of a tile moves": [text(BEFORE), image((12, 9), seed=1), compress(), seq_add(0, BEFORE + 40, -1, 6), text(AFTER, seed=1)],
    "two sequences": [text(BEFORE), image((12, 9), seed=1), compress(), seq_cp(0, 1), text(3, seed=4), text(5, seed=5, seq=1), together({0: 11, 1: 12})],
    "a state": [text(BEFORE), image((12, 9), seed=1), compress(), state_save("s"), text(3), state_load("s"), text(AFTER, seed=1)],
}  # fmt: skip


@pytest.mark.parametrize("name", SHIFTED)
def test_positions_and_sequences(models, patched, name):
    which = [("llama", "f16"), ("qwen2", "f32, no FA")]
    ours, unpacked = (patched(cases(models, SHIFTED[name], which, n_seq_max=2), env=env) for env in ({}, UNPACK))
    for case in ours:
        assert ours[case].error == ""
        assert nmse(ours[case].logits(), unpacked[case].logits()) <= KERNELS
    # a tile whose tokens are not the same steps apart is unpacked
    assert all((ours[case].logits() == unpacked[case].logits()).all() for case in ours) == (name == "a part of a tile moves")


def test_a_graph_is_used_again(models, patched):
    which = [("llama", "f16"), ("qwen2vl", "f32, no FA")]
    steps = [text(BEFORE), image((12, 9), seed=1), compress(), text(12, seed=2, one_by_one=True)]
    again, fresh = (patched(cases(models, steps, which, reuse=reuse)) for reuse in (True, False))
    for case in again:
        assert again[case].n_reused >= 8 and fresh[case].n_reused == 0
        assert (again[case].logits() == fresh[case].logits()).all()


def test_any_number_of_threads(models, patched):
    which = [("llama", "f32, no FA")]
    one, three = (patched(cases(models, CHAT[:-2], which, threads=n))["llama, f32, no FA"] for n in (1, 3))
    assert nmse(three.logits(), one.logits()) <= 1e-9


def test_small_batches(models, patched):
    """The tokens of a batch in pieces of 32, whichever way each goes."""
    which = [("llama", "f32, no FA")]
    whole, pieces = (patched(cases(models, CHAT, which, n_ubatch=n))["llama, f32, no FA"] for n in (512, 32))
    assert nmse(pieces.logits()[:FIRST], whole.logits()[:FIRST]) <= KERNELS


def test_a_path_that_is_not_there(models, patched):
    plain, odd = (patched(cases(models, CHAT[:4], [("llama", "f16")]), env=env)["llama, f16"] for env in ({}, {"LLAMA_KVCAPSULE_PATH": "fast"}))
    assert any("LLAMA_KVCAPSULE_PATH=fast is ignored, there are: unpack host op" in line for line in odd.log) and not any("is ignored" in line for line in plain.log)
    assert (odd.logits() == plain.logits()).all() and np.isfinite(plain.logits()).all()


# --- each alone is lossless ---

LOSSLESS = {
    "chat": Script(LOSSLESS_CHAT),
    "many": Script([s for i in range(24) for s in (image((4, 8), seed=i), compress(), text(2, seed=i))], {"n_ctx": 2048}),
}
SETTINGS = [(s, script) for s in settings(heads=(64, 80)) for script in LOSSLESS if script != "many" or s[1] == 64]


@pytest.fixture(scope="module", params=["unpack", "host"])
def lossless(request, models, capsules, stock, patched):
    todo = {label(s, script): (s, LOSSLESS[script]) for s, script in SETTINGS}
    return both(models, capsules, stock, lambda cases: patched(cases, env={"LLAMA_KVCAPSULE_PATH": request.param}), todo)


@pytest.mark.parametrize(("setting", "script"), SETTINGS, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_lossless(lossless, setting, script):
    """Before the usual attention."""
    pair = lossless[label(setting, script)]
    assert nmse(pair[1].logits(), pair[0].logits()) <= rounded_limit(setting[2], setting[3])


def test_the_mean(lossless):
    """Of all cases without flash attention."""
    assert mean(lossless) <= 1e-9
