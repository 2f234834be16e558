"""Lossy capsules in the library against the numpy reference: what a slot holds, and what attention makes of it. (Which tier a tile gets: test_tile_cache.py)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from llama_runner import Case, Result, compress, image, image_file, nmse, read_kv, stats, text
from make_capsule import F16, MIXED
from test_tile_cache import graded, picture
from tiny_gguf import ROPE_KINDS, TinyModel

from kvcapsule_gguf.codec.hadamard import hadamard
from kvcapsule_gguf.codec.rope import apply_rope
from kvcapsule_gguf.codec.tiles import cut_grid
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule

LAYERS, HEADS, HEADS_KV = 2, 4, 2
BEFORE, IMAGE, AFTER = 7, (8, 8), 6
TOKENS = IMAGE[0] * IMAGE[1]


@dataclass(frozen=True)
class Kind:
    model: TinyModel
    bits: int | Sequence[int] = MIXED
    axes: bool = True
    cache: str = "f16"


KINDS = {
    "mixed": Kind(TinyModel("llama")),
    "mixed, no axes": Kind(TinyModel("llama"), axes=False),
    **{f"mixed, head {head}": Kind(TinyModel("llama" if head % 3 else "qwen2", head=head)) for head in (32, 80, 96, 128, 384, 512)},
    "mixed, M-RoPE": Kind(TinyModel("qwen2vl")),
    "mixed, interleaved M-RoPE": Kind(TinyModel("qwen3vl")),
    "mixed, q8_0 cache": Kind(TinyModel("llama"), cache="q8_0"),
    **{f"{bits} bits": Kind(TinyModel("qwen2"), bits) for bits in (1, 2, 3, 4, 6, 8, F16)},
}
GRID = [(kind, fa) for kind in KINDS for fa in (False, True) if fa or KINDS[kind].cache == "f16"]


@pytest.fixture(scope="module")
def results(models, capsules, patched):
    reads = [read_kv(il) for il in range(LAYERS)]
    steps = [text(BEFORE), image(IMAGE, seed=1), *reads, compress(), *reads, text(AFTER, seed=1), *reads, stats()]
    cases = []
    for kind, fa in GRID:
        k = KINDS[kind]
        capsule = capsules(models(k.model), tiers=(k.bits,), axes=k.axes)
        cases.append(Case(f"{kind}-{fa}", models(k.model), steps, flash_attn=fa, capsule=capsule, quality=1e9, type_k=k.cache, type_v=k.cache, dump=r"(Qcur|kqv_out)-\d+"))
    return patched(cases)


def vision(result: Result, step: int) -> tuple[np.ndarray, np.ndarray]:
    found = slice(BEFORE, BEFORE + TOKENS)
    return tuple(result.steps[step].arrays[x][found] for x in "kv")


@pytest.mark.parametrize(("kind", "fa"), GRID)
def test_a_slot_holds_what_the_reference_encodes(results, models, capsules, kind, fa):
    result, k = results[f"{kind}-{fa}"], KINDS[kind]
    assert not result.error and result.values("stats")[0]["n_slots_tier"][0] == 1
    content = read_tile_capsule(capsules(models(k.model), tiers=(k.bits,), axes=k.axes))
    for il in range(LAYERS):
        for name, before, ours in zip("kv", vision(result, 2 + il), vision(result, 3 + LAYERS + il)):
            heads = content.heads(il, name, 0)
            wanted = np.stack([head.decode(head.encode(before[:, i], *IMAGE), *IMAGE) for i, head in enumerate(heads)], 1)
            loss = nmse(wanted.reshape(TOKENS, -1), before.reshape(TOKENS, -1))
            assert loss > 1e-9  # it is lossy
            # a value halfway between two codes may go either way
            assert nmse(ours.reshape(TOKENS, -1), wanted.reshape(TOKENS, -1)) <= 1e-6 + 1e-3 * loss


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
    """A relative error of 1e-2, and 1.2e-2 where all rows of V, the constant one too, have so few bits that their weights have 8."""
    if kind.cache != "f16":
        return 1e-3
    return 1.5e-4 if kind.bits in (1, 2, 3) else 1e-4


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


# --- pictures whose tiles are unlike each other ---


def wild(path, n_embd: int, h: int, w: int, seed: int):
    """An image whose tiles are unlike each other: some have tokens that are far out."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((h * w, n_embd))
    for _, _, tokens in cut_grid(h, w):
        x[tokens] *= rng.uniform(0.3, 2)
    x[rng.integers(0, h * w, h * w // 24)] *= 12
    x[rng.integers(0, h * w, h * w // 24), : n_embd // 8] += 9
    np.save(path, x.astype(np.float32))
    return image_file(path, h, w)


def test_quality_saves_answers(models, capsules, stock, patched, tmp_path):
    """A wild image costs bytes and not its logits: with a quality, tiles that few bits would distort get more of them."""
    model = models(arch="qwen2vl")
    script = [text(5), wild(tmp_path / "wild.npy", 256, 16, 24, 5), compress(), text(8), stats()]
    capsule = capsules(model, tiers=(3, 8))
    truth = stock([Case("a", model, [s for s in script if s["op"] not in ("compress", "stats")])])["a"].logits(2)
    done = patched([Case(str(q), model, script, capsule=capsule, quality=q) for q in (0.5, 1e9)])
    loss = {g: nmse(r.logits(3), truth) for g, r in done.items()}
    assert done["1000000000.0"].values("stats")[0]["n_slots_tier"][:2] == [6, 0]
    assert loss["0.5"] < 0.05 * loss["1000000000.0"]


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_threads_change_no_bit(models, patched, tmp_path, arch):
    """Heads and tiles are shared by the threads; the picture has tiles at its edges, and of several tiers."""
    model, path = models(arch=arch), tmp_path / "graded.gguf"
    graded(model, path, 500.0)
    h, w = (17, 17) if arch == "llama" else (12, 26)
    reads = [read_kv(il) for il in range(LAYERS)]
    steps = [image_file(picture(tmp_path / "a.npy", h, w, 256, 1), h, w), compress(), stats(), *reads]
    done = patched([Case(str(n), model, steps, capsule=path, threads=n) for n in (1, 2, 5)])
    assert sum(n > 0 for n in done["1"].values("stats")[0]["n_slots_tier"]) > 1
    for n in ("2", "5"):
        assert done[n].values("stats") == done["1"].values("stats")
        for il in range(LAYERS):
            assert all(np.array_equal(done[n].steps[3 + il].arrays[x], done["1"].steps[3 + il].arrays[x]) for x in "kv")
