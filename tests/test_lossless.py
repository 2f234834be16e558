"""A capsule whose blocks are all f32 loses nothing: after compression the logits are those of the stock library that never compressed.

Every case is a script of steps; the stock library runs it without its `compress` steps. Here small batches attend to slots as they are, the default: `lossless_limit`
says what stock itself rounds. Without flash attention and with an f32 cache that is nothing, and NMSE <= 2e-11. test_paths holds the other ways to 1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from llama_runner import Case, Step, compress, image, lossless_limit, nmse, positions, stats, text
from make_capsule import F32

ARCHS = ("llama", "qwen2", "qwen2vl")

Setting = tuple[str, int, bool, str]  # arch, head size, flash attention, type of K


def settings(archs=ARCHS, heads=(64, 96, 80)) -> list[Setting]:
    """q8_0 needs head sizes that are multiples of 32."""
    return [s for s in product(archs, heads, (False, True), ("f32", "f16", "q8_0")) if not (s[1] == 80 and s[3] == "q8_0")]


@dataclass(frozen=True)
class Script:
    steps: list[Step]
    context: dict[str, Any] = field(default_factory=dict)  # fields of Case for both libraries
    capsule: dict[str, Any] = field(default_factory=dict)  # fields of Case for the patched one
    file: dict[str, Any] = field(default_factory=dict)  # options of the capsule file


def stock_steps(steps: list[Step]) -> list[Step]:
    """The same script for a library without capsules, step by step: nothing happens in place of a `compress`."""
    return [positions() if s["op"] in ("compress", "stats") else s for s in steps]


def both(models, capsules, stock, patched, todo: dict[str, tuple[Setting, Script]]):
    """Runs scripts in both libraries -> {name: (stock result, patched result)}."""
    plain, packed = [], []
    for name, ((arch, head, fa, type_k), s) in todo.items():
        model = models(arch=arch, head=head)
        # V is quantized too where llama.cpp can: with flash attention
        common = {"flash_attn": fa, "type_k": type_k, "type_v": "f16" if type_k == "q8_0" and not fa else type_k, "n_seq_max": 2} | s.context
        plain.append(Case(name, model, stock_steps(s.steps), **common))
        packed.append(Case(name, model, s.steps, capsule=capsules(model, **s.file), **common, **s.capsule))
    a, b = stock(plain), patched(packed)
    return {name: (a[name], b[name]) for name in todo}


def check(pair, fa: bool, type_k: str = "f16") -> None:
    truth, ours = pair
    assert nmse(ours.logits(), truth.logits()) <= lossless_limit(fa, type_k)


def mean(pairs: dict) -> float:
    """Over the cases without flash attention."""
    return float(np.mean([nmse(ours.logits(), truth.logits()) for name, (truth, ours) in pairs.items() if "-False-" in name]))


# --- every model and cache ---

# 64 tokens are one tile, 60 are two: of a grid of 6 x 10, or lines of 8 and what is left; the single-token batches reuse their graph
CHAT = [
    text(7), image((8, 8), seed=1), compress(), text(5, seed=1), text(6, seed=2, one_by_one=True),
    image((6, 10), seed=2), compress(), text(4, seed=3), text(5, seed=4, one_by_one=True), positions(), stats(),
]
MAIN = [(s, reuse) for s in settings() for reuse in (True, False)]


def label(s: Setting, *more: Any) -> str:
    return "-".join(map(str, (*s, *more)))


@pytest.fixture(scope="module")
def main(models, capsules, stock, patched):
    return both(models, capsules, stock, patched, {label(s, reuse): (s, Script(CHAT, {"reuse": reuse})) for s, reuse in MAIN})


@pytest.mark.parametrize(("setting", "reuse"), MAIN, ids=lambda x: label(x) if isinstance(x, tuple) else f"reuse={x}")
def test_every_model_and_cache(main, setting, reuse):
    truth, ours = main[label(setting, reuse)]
    check((truth, ours), *setting[2:])
    assert ours.values("moved") == [64, 60]
    assert ours.values("positions") == truth.values("positions")[-1:]
    seen = ours.values("stats")[-1]
    assert (seen["n_cold"], seen["n_hot_vision"], sum(seen["n_slots_tier"])) == (124, 0, 3)
    assert seen["n_hot_used"] == 7 + 5 + 6 + 4 + 5
    # a graph is built once after each change and used again for the tokens that follow
    assert (ours.n_reused >= 8) if reuse else (ours.n_reused == 0)


# --- axes of V, and tiers ---

FILES: dict[str, Script] = {
    "no axes": Script(CHAT, file={"axes": False}),
    "the last tier": Script(CHAT, capsule={"quality": 1e-6}, file={"tiers": (4, 8, F32)}),  # the others are not that good
}
KINDS = [(s, f) for s in settings(heads=(64,)) for f in FILES]


@pytest.fixture(scope="module")
def kinds(models, capsules, stock, patched):
    return both(models, capsules, stock, patched, {label(s, f): (s, FILES[f]) for s, f in KINDS})


@pytest.mark.parametrize(("setting", "file"), KINDS, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_file(kinds, setting, file):
    pair = kinds[label(setting, file)]
    check(pair, *setting[2:])
    slots = pair[1].values("stats")[-1]["n_slots_tier"]
    assert slots[:3] == ([3, 0, 0] if file == "no axes" else [0, 0, 3])


# --- every order of events ---

SCENES: dict[str, Script] = {
    "image first": Script([image((8, 8)), compress(), text(6), text(4, seed=1, one_by_one=True)]),
    "long generation": Script([text(5), image((8, 8)), compress(), text(3), text(40, seed=1, one_by_one=True), text(230, seed=2), text(4, seed=3)]),
    "compressed late": Script([text(7), image((8, 8)), text(9, seed=1), compress(), text(5, seed=2), text(3, seed=3, one_by_one=True)]),
    "image after image": Script([text(5), image((4, 8), seed=1), image((4, 8), seed=2), compress(), text(6), text(3, seed=1, one_by_one=True)]),
    "two images at once": Script([text(5), image((4, 8), seed=1), text(4), image((6, 8), seed=2), compress(), text(6), text(3, seed=1)]),
    "twice": Script([text(5), image((8, 8)), compress(), compress(), text(6), compress(), text(4)]),
    "one ubatch at a time": Script([text(7), image((8, 12)), compress(), text(40), text(4, seed=1)], {"n_ubatch": 24, "n_batch": 96}),
    "larger than a batch": Script([text(7), image((20, 30)), compress(), text(9), text(4, seed=1, one_by_one=True)], {"n_ubatch": 64, "n_batch": 200}),
    "two long lines": Script([text(7), image((2, 35)), compress(), text(9), text(4, seed=1, one_by_one=True)]),
    "few tokens": Script([text(7), image((1, 7)), compress(), text(9)]),
    "one token": Script([text(7), image((1, 1)), compress(), text(9)]),
    "many slots": Script([text(5), *[x for i in range(6) for x in (image((12, 16), seed=i), compress(), text(3, seed=i))]], {"n_ctx": 2048}),
    "automatic": Script([s for s in CHAT if s["op"] != "compress"], capsule={"auto_compress": True}),
    "automatic, two images": Script([text(5), image((4, 8), seed=1), image((4, 8), seed=2), text(6), text(3, seed=1)], capsule={"auto_compress": True}),
    "automatic, larger than a batch": Script(
        [text(7), image((20, 30)), text(9), text(4, seed=1, one_by_one=True)], {"n_ubatch": 64, "n_batch": 200}, {"auto_compress": True}),
}
ORDERS = [(s, scene) for s in settings(heads=(64,)) for scene in SCENES]


@pytest.fixture(scope="module")
def orders(models, capsules, stock, patched):
    todo = {}
    for s, scene in ORDERS:
        script = SCENES[scene]
        todo[label(s, scene)] = (s, Script([*script.steps, positions(), stats()], script.context, script.capsule, script.file))
    return both(models, capsules, stock, patched, todo)


@pytest.mark.parametrize(("setting", "scene"), ORDERS, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_order(orders, setting, scene):
    truth, ours = orders[label(setting, scene)]
    check((truth, ours), *setting[2:])
    assert ours.values("positions")[-1] == truth.values("positions")[-1]
    seen = ours.values("stats")[-1]
    vision = sum(s["h"] * s["w"] for s in SCENES[scene].steps if s["op"] == "image")
    assert (seen["n_cold"], seen["n_hot_vision"]) == (vision, 0)


def test_the_mean(main, kinds, orders):
    """Of all cases in f32; reuse makes no difference."""
    for pairs in (main, kinds, orders):
        assert mean({name: pair for name, pair in pairs.items() if "-False-f32" in name}) <= 1e-11


def test_moved(orders):
    """compress returns what it moved, and nothing the second time."""
    for setting, scene in ORDERS:
        moved = orders[label(setting, scene)][1].values("moved")
        assert (scene != "twice") or moved == [64, 0, 0]
        assert (scene != "two images at once") or moved == [80]


SHAPES = [("llama", 4, 4, 3), ("qwen2", 4, 1, 2), ("qwen2vl", 6, 2, 2)]


@pytest.mark.parametrize(("arch", "n_head", "n_head_kv", "n_layer"), SHAPES)
def test_head_counts(models, capsules, stock, patched, arch, n_head, n_head_kv, n_layer):
    model = models(arch=arch, n_head=n_head, n_head_kv=n_head_kv, n_layer=n_layer)
    cases = [Case(str(fa), model, CHAT, flash_attn=fa) for fa in (False, True)]
    truth = stock([Case(c.name, model, stock_steps(CHAT), flash_attn=c.flash_attn) for c in cases])
    for c in cases:
        c.capsule = capsules(model)
    ours = patched(cases)
    for fa in (False, True):
        check((truth[str(fa)], ours[str(fa)]), fa)


ROPES = [{"freq_factors": True}, {"yarn": True}]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: next(iter(r)))
def test_scaled_rope(models, capsules, stock, patched, rope):
    model = models(arch="llama", **rope)
    truth = stock([Case("a", model, stock_steps(CHAT))])["a"]
    ours = patched([Case("a", model, CHAT, capsule=capsules(model))])["a"]
    check((truth, ours), False)


SHORT = [text(5), image((4, 8)), compress(), text(3, seed=1), text(2, seed=2, one_by_one=True)]  # waiting threads are slow on a busy machine
THREADS = [(arch, fa, threads) for arch, threads in (("llama", 2), ("qwen2vl", 3)) for fa in (False, True)]


@pytest.fixture(scope="module")
def threaded(models, capsules, stock, patched):
    scripts = {label((arch, 64, fa, "f32"), t): ((arch, 64, fa, "f32"), Script(SHORT, {"threads": t})) for arch, fa, t in THREADS}
    return both(models, capsules, stock, patched, scripts)


@pytest.mark.parametrize(("arch", "fa", "threads"), THREADS)
def test_threads(threaded, arch, fa, threads):
    """Any number of them, also one that divides nothing evenly."""
    check(threaded[label((arch, 64, fa, "f32"), threads)], fa, "f32")


# --- who rounds ---

CACHES = [(arch, type_k, fa) for arch in ("llama", "qwen2vl") for type_k in ("f16", "q8_0") for fa in (False, True)]


def test_nearer_to_f32_than_stock(models, capsules, stock, patched):
    """Stock with an f32 cache and without flash attention rounds nothing: with other caches attention on slots is nearer to it than stock."""
    steps = SCENES["many slots"].steps
    plain, packed = [], []
    for arch in ("llama", "qwen2vl"):
        plain.append(Case(arch, models(arch=arch), stock_steps(steps), n_ctx=2048, type_k="f32", type_v="f32"))
    for arch, type_k, fa in CACHES:
        common = {"n_ctx": 2048, "type_k": type_k, "type_v": type_k if fa else "f16", "flash_attn": fa}
        plain.append(Case(f"{arch}-{type_k}-{fa}", models(arch=arch), stock_steps(steps), **common))
        packed.append(Case(f"{arch}-{type_k}-{fa}", models(arch=arch), steps, capsule=capsules(models(arch=arch)), **common))
    theirs, ours = stock(plain), patched(packed)
    for name in ours:
        truth = theirs[name.split("-")[0]].logits()
        assert nmse(ours[name].logits(), truth) <= nmse(theirs[name].logits(), truth)


# --- the oracle can fail ---


def test_a_wrong_capsule_is_seen(models, capsules, stock, patched):
    """Eight bits are a small error of K and V, and far above the limit."""
    model = models(arch="llama")
    truth = stock([Case("a", model, stock_steps(CHAT))])["a"]
    ours = patched([Case("a", model, CHAT, capsule=capsules(model, tiers=(8,)))])["a"]
    assert nmse(ours.logits(), truth.logits()) > 3 * lossless_limit(False)
