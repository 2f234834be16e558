"""Lossy capsules in the library against the numpy reference: what a slot holds, what attention makes of it, and which tier the guard picks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from llama_runner import Case, Result, compress, image, image_file, nmse, read_kv, stats, text
from tiny_gguf import ROPE_KINDS, TinyModel

from kvcapsule_gguf.codec.guard import block_score
from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.rope import apply_rope
from kvcapsule_gguf.format.block import BlockCodec
from kvcapsule_gguf.format.capsule import Capsule
from kvcapsule_gguf.format.reader import read_capsule

N, LAYERS, HEADS, HEADS_KV = 16, 2, 4, 2
BEFORE, IMAGE, AFTER = 7, (8, 8), 6
BLOCKS = IMAGE[0] * IMAGE[1] // N


@dataclass(frozen=True)
class Kind:
    model: TinyModel
    file: dict[str, Any] = field(default_factory=dict)
    cache: str = "f16"


KINDS = {
    "graded": Kind(TinyModel("llama")),
    "graded, head 96": Kind(TinyModel("qwen2", head=96)),
    "graded, head 80": Kind(TinyModel("llama", head=80)),
    "graded, head 512": Kind(TinyModel("llama", head=512)),
    "graded, M-RoPE": Kind(TinyModel("qwen2vl")),
    "graded, q8_0 cache": Kind(TinyModel("llama"), cache="q8_0"),
    "f16 rows": Kind(TinyModel("qwen2"), {"rows": (0, 7, 0, 0, 0)}),
    "q8_0 rows": Kind(TinyModel("qwen2"), {"rows": (0, 0, 9, 0, 0)}),
    "q4_0 rows": Kind(TinyModel("qwen2"), {"rows": (0, 0, 0, 16, 0)}),
    "q2_0 rows": Kind(TinyModel("qwen2"), {"rows": (0, 0, 0, 0, 16)}),
    "one of each": Kind(TinyModel("llama"), {"rows": (1, 1, 1, 1, 1), "value_rows": (0, 0, 2, 0, 3)}),
    "retain": Kind(TinyModel("llama"), {"key_codec": "retain", "rows": (0, 0, 0, 8, 0)}),
    "retain, residuals": Kind(TinyModel("qwen2"), {"key_codec": "retain", "rows": (0, 0, 2, 6, 6)}),
    "retain, M-RoPE": Kind(TinyModel("qwen3vl"), {"key_codec": "retain", "kept": 6, "neighbours": 3, "rows": (0, 0, 4, 12, 0)}),
    "retain, head 128": Kind(TinyModel("llama", head=128), {"key_codec": "retain", "kept": 6, "rows": (0, 0, 1, 7, 8)}),
    "retain, head 384": Kind(TinyModel("llama", head=384), {"key_codec": "retain", "kept": 6, "rows": (0, 0, 1, 7, 8)}),
    "retain, f16 rows": Kind(TinyModel("llama"), {"key_codec": "retain", "rows": (0, 1, 1, 6, 6)}),
    "retain, q8_0 cache": Kind(TinyModel("llama"), {"key_codec": "retain", "rows": (0, 0, 0, 8, 8)}, cache="q8_0"),
    "retain, MLP": Kind(TinyModel("qwen2vl"), {"key_codec": "retain", "kept": 6, "neighbours": 4, "mlp_width": 8, "rows": (0, 0, 0, 6, 10)}),
}
GRID = [(kind, fa) for kind in KINDS for fa in (False, True) if fa or KINDS[kind].cache == "f16"]


@pytest.fixture(scope="module")
def results(models, capsules, patched):
    reads = [read_kv(il) for il in range(LAYERS)]
    steps = [text(BEFORE), image(IMAGE, seed=1), *reads, compress(), *reads, text(AFTER, seed=1), *reads, stats()]
    cases = []
    for kind, fa in GRID:
        k = KINDS[kind]
        capsule = capsules(models(k.model), block_size=N, lossless=False, **k.file)
        cases.append(Case(f"{kind}-{fa}", models(k.model), steps, flash_attn=fa, capsule=capsule, type_k=k.cache, type_v=k.cache,
                          dump=r"(Qcur|kqv_out)-\d+"))
    return patched(cases)


def blocks(x: np.ndarray) -> np.ndarray:
    """[token, head, d] -> [block, head, N, d]"""
    return x.reshape(-1, N, *x.shape[1:]).swapaxes(1, 2)


def vision(result: Result, step: int) -> tuple[np.ndarray, np.ndarray]:
    found = slice(BEFORE, BEFORE + BLOCKS * N)
    return tuple(result.steps[step].arrays[x][found] for x in "kv")


@pytest.mark.parametrize(("kind", "fa"), GRID)
def test_a_slot_holds_what_the_reference_encodes(results, models, capsules, kind, fa):
    result = results[f"{kind}-{fa}"]
    assert not result.error and result.values("stats")[0]["n_slots"] == [BLOCKS, 0]
    content = read_capsule(capsules(models(KINDS[kind].model), block_size=N, lossless=False, **KINDS[kind].file))
    for il in range(LAYERS):
        k, v = vision(result, 2 + il)
        got = vision(result, 3 + LAYERS + il)
        for x, ours, wanted in zip((k, v), got, round_trip(KINDS[kind], content, il, blocks(k), blocks(v))):
            wanted = wanted.swapaxes(1, 2).reshape(x.shape)
            loss = nmse(wanted, x)
            assert loss > 1e-8  # it is lossy
            # a value halfway between two codes may go either way; rotated keys are not the reference's to the last bit, and others are predicted from them
            assert nmse(ours, wanted) <= 1e-6 + (2e-2 if stored_rotated(KINDS[kind]) else 1e-3) * loss
            off = ((ours - wanted) ** 2).sum((1, 2)) > 1e-5 * (wanted**2).sum((1, 2))
            assert off.mean() <= 0.15


def stored_rotated(kind: Kind) -> bool:
    """`retain` without a key MLP keeps the keys of a block rotated by the position of its first token."""
    return kind.file.get("key_codec") == "retain" and not kind.file.get("mlp_width")


def round_trip(kind: Kind, content: Capsule, il: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K (without RoPE) and V of blocks as slots keep them."""
    codec, model = BlockCodec.of(content, il, 1), kind.model
    if not stored_rotated(kind):
        return codec.round_trip(k, v)
    first = positions(model)[BEFORE : BEFORE + BLOCKS * N : N]
    kinds = {"rope_type": ROPE_KINDS[model.arch], "sections": model.sections}
    k = np.stack([apply_rope(b, np.repeat(p[None], N, 0), **kinds) for b, p in zip(k, first)])
    k_hat, v_hat = codec.round_trip(k, v)
    return np.stack([apply_rope(b, np.repeat(p[None], N, 0), **kinds, inverse=True) for b, p in zip(k_hat, first)]), v_hat


def positions(model: TinyModel) -> np.ndarray:
    """[token, 4]: t, y, x, z of all tokens."""
    h, w = IMAGE
    if not model.mrope:
        return np.repeat(np.arange(BEFORE + h * w + AFTER)[:, None], 4, 1)
    y, x = np.divmod(np.arange(h * w), w)
    grid = BEFORE + np.stack([0 * y, y, x, 0 * y], 1)
    after = BEFORE + max(h, w) + np.arange(AFTER)
    return np.concatenate([np.repeat(np.arange(BEFORE)[:, None], 4, 1), grid, np.repeat(after[:, None], 4, 1)])


def limit(kind: Kind) -> float:
    """Keys that are not rebuilt meet queries in 8 bits; of other keys and of values rows of 4 and 2 bits meet weights in 8 bits: to a relative error of 1e-2
    (DESIGN 7.3), where nothing has more than 2 bits 1.2e-2."""
    if kind.cache != "f16":
        return 1e-3
    rows = kind.file.get("rows", (0, 0, 1, 1, 1))
    values = kind.file.get("value_rows", rows)
    if not any(rows[:4]):
        return 1.5e-4
    if any(rows[3:]) or any(values[3:]):
        return 1e-4
    return 1e-4 if kind.file.get("key_codec") != "retain" and not any(rows[:2]) else 1e-5


@pytest.mark.parametrize(("kind", "fa"), GRID)
def test_attention_sees_what_the_slots_hold(results, kind, fa):
    """The first layer's attention of the text after the image, computed here from what read_kv decodes."""
    model, result = KINDS[kind].model, results[f"{kind}-{fa}"]
    step = result.steps[3 + 2 * LAYERS]
    names = step.values["tensors"]
    pick = {name: step.arrays[f"tensor{i}"] for i, (name, op) in enumerate(names) if name != "Qcur-0" or op == "ROPE"}
    q = pick["Qcur-0"].reshape(AFTER, HEADS, model.head)
    k, v = (result.steps[4 + 2 * LAYERS].arrays[x] for x in "kv")
    pos = positions(model)
    k = apply_rope(k.swapaxes(0, 1), pos, rope_type=ROPE_KINDS[model.arch], sections=model.sections)
    out = np.zeros((AFTER, HEADS, model.head))
    for h in range(HEADS):
        g = h // (HEADS // HEADS_KV)
        for i in range(AFTER):
            seen = len(pos) - AFTER + i + 1
            score = k[g, :seen].astype(np.float64) @ q[i, h] / np.sqrt(model.head)
            p = np.exp(score - score.max())
            out[i, h] = p / p.sum() @ v[:seen, g]
    quantized = KINDS[kind].cache != "f16"
    got = pick["kqv_out-0"].reshape(out.shape)
    got = hadamard(got) if quantized else got  # here llama.cpp has not yet undone its own rotation of such values
    assert nmse(got.reshape(AFTER, -1), out.reshape(AFTER, -1)) <= limit(KINDS[kind])


# --- the guard ---


def wild(path, n_embd: int, n: int, seed: int):
    """An image whose blocks are unlike each other: some have tokens that are far out."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n_embd)) * rng.uniform(0.3, 2, (-(-n // N), 1, 1)).repeat(N, 1).reshape(-1, 1)[:n]
    x[rng.integers(0, n, n // 24)] *= 12
    x[rng.integers(0, n, n // 24), : n_embd // 8] += 9
    np.save(path, x.astype(np.float32))
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen2vl"])
def test_the_guard_decides_as_the_reference(models, capsules, patched, tmp_path, arch):
    model, file = models(arch=arch), {"lossless": False, "rows": (0, 0, 4, 8, 4), "faithful_rows": (0, 0, N, 0, 0)}
    h, w = 16, 24
    picture = image_file(wild(tmp_path / "wild.npy", 256, h * w, 3), h, w)
    reads = [read_kv(il) for il in range(LAYERS)]
    plain = patched([Case("a", model, [picture, *reads])])["a"]
    content = read_capsule(capsules(model, block_size=N, **file))
    worst = np.zeros(h * w // N)
    for il in range(LAYERS):
        k, v = (blocks(plain.steps[1 + il].arrays[x]) for x in "kv")
        k_hat, v_hat = BlockCodec.of(content, il, 1).round_trip(k, v)
        worst = np.maximum(worst, block_score(k, v, k_hat, v_hat, content.layers[il].k_query_weight))
    ordered = np.sort(worst)
    gap = int(np.argmax(ordered[8:17] / ordered[7:16])) + 8  # the clearest step in the middle
    kappa = float(np.sqrt(ordered[gap - 1] * ordered[gap]))

    capsule = capsules(model, block_size=N, kappa=kappa, **file)
    steps = [picture, compress(), stats(), *reads]
    done = patched([Case(str(g), model, steps, capsule=capsule, guard=g) for g in (True, False)])
    assert done["True"].values("stats")[0]["n_slots"] == [gap, len(worst) - gap]
    assert done["False"].values("stats")[0]["n_slots"] == [len(worst), 0]
    # and the right ones: the refused blocks are now as good as the faithful tier
    for il in range(LAYERS):
        k, v = (blocks(plain.steps[1 + il].arrays[x]) for x in "kv")
        now = {g: blocks(done[g].steps[3 + il].arrays["v"]) for g in done}
        loss = {g: ((now[g] - v) ** 2).sum((1, 2, 3)) for g in now}
        refused = worst > kappa
        assert np.allclose(loss["True"][~refused], loss["False"][~refused], rtol=1e-3)
        assert (loss["True"][refused] < 0.2 * loss["False"][refused]).all()


def test_the_guard_has_nothing_finer_to_offer(models, capsules, patched, tmp_path):
    """A preset that keeps more bytes than the faithful tier keeps every block, whatever its kappa."""
    model = models(arch="llama")
    picture = image_file(wild(tmp_path / "wild.npy", 256, 64, 5), 8, 8)
    slots = {}
    for name, rows, faithful in (("finer", (0, 0, N, 0, 0), (0, 0, 0, N, 0)), ("coarser", (0, 0, 0, N, 0), (0, 0, N, 0, 0))):
        capsule = capsules(model, block_size=N, lossless=False, rows=rows, faithful_rows=faithful, kappa=1e-6)
        slots[name] = patched([Case(name, model, [picture, compress(), stats()], capsule=capsule, guard=True)])[name].values("stats")[0]["n_slots"]
    assert slots == {"finer": [64 // N, 0], "coarser": [0, 64 // N]}


def test_the_faithful_tier_saves_answers(models, capsules, stock, patched, tmp_path):
    """With the guard a wild image costs bytes and not its logits."""
    model = models(arch="llama")
    picture = image_file(wild(tmp_path / "wild.npy", 256, 384, 5), 16, 24)
    script = [text(5), picture, compress(), text(8), stats()]
    capsule = capsules(model, block_size=N, lossless=False, rows=(0, 0, 2, 4, 4), faithful_rows=(0, 0, N, 0, 0), kappa=1.0)
    truth = stock([Case("a", model, [s for s in script if s["op"] not in ("compress", "stats")])])["a"].logits(2)
    done = patched([Case(str(g), model, script, capsule=capsule, guard=g) for g in (True, False)])
    loss = {g: nmse(r.logits(3), truth) for g, r in done.items()}
    assert loss["True"] < 0.05 * loss["False"]


@pytest.mark.parametrize(("kind", "kappa"), [("graded", 25), ("graded, M-RoPE", 28), ("retain, residuals", 200), ("retain, MLP", 28)])
def test_threads_change_no_bit(models, capsules, patched, tmp_path, kind, kappa):
    """Heads and blocks are shared by the threads; the picture has a remainder and blocks that the guard refuses."""
    model = models(KINDS[kind].model)
    h, w = 12, 26
    picture = image_file(wild(tmp_path / "wild.npy", 256, h * w, 3), h, w)
    capsule = capsules(model, block_size=N, lossless=False, kappa=kappa, **KINDS[kind].file)
    reads = [read_kv(il) for il in range(LAYERS)]
    done = patched([Case(str(n), model, [picture, compress(), stats(), *reads], capsule=capsule, guard=True, threads=n) for n in (1, 2, 5)])
    economy, faithful = done["1"].values("stats")[0]["n_slots"]
    assert economy > 1 and faithful > 1
    for n in ("2", "5"):
        assert done[n].values("stats") == done["1"].values("stats")
        for il in range(LAYERS):
            assert all(np.array_equal(done[n].steps[3 + il].arrays[x], done["1"].steps[3 + il].arrays[x]) for x in "kv")
