"""Damaged capsules, and those of other models, are refused with one line that names the reason, and the process goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_runner import Case, StepResult, compress, image, load_capsule, stats, text
from tiny_gguf import rewrite

N = 16
U32, F32, STR = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING

Damage = Callable[[Path, Path], Any]  # reads a good capsule, writes a bad one


def fields(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def raw(change: Callable[[bytes], bytes]) -> Damage:
    return lambda good, bad: bad.write_bytes(change(good.read_bytes()))


def key(name: str, value: Any, kind: gguf.GGUFValueType = U32) -> Damage:
    """Sets a key; a function maps its old value."""

    def damage(good: Path, bad: Path) -> None:
        rewrite(good, bad, kv={name: (value(fields(good)[name]) if callable(value) else value, kind)})

    return damage


def without(*names: str) -> Damage:
    return lambda good, bad: rewrite(good, bad, kv={n: None for n in names if not n.startswith("blk.")},
                                     tensors={n: None for n in names if n.startswith("blk.")})


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return lambda good, bad: rewrite(good, bad, tensors={name: change})


def put(value: float, *at: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data[at] = value
        return data

    return change


def at(i: int, value: Any) -> Callable[[list], list]:
    return lambda old: [*old[:i], value, *old[i + 1:]]


K = "blk.1.kvcapsule."
DAMAGES: dict[str, tuple[Damage, str]] = {
    # the file itself
    "empty": (raw(lambda b: b""), "GGUF|incomplete"),
    "no GGUF": (raw(lambda b: b"Not a model at all.\n" * 50), "GGUF"),
    "magic": (raw(lambda b: b"GGML" + b[4:]), "GGUF"),
    "future GGUF": (raw(lambda b: b[:4] + (99).to_bytes(4, "little") + b[8:]), "GGUF"),
    "cut in the header": (raw(lambda b: b[:20]), "GGUF|incomplete"),
    "cut in the keys": (raw(lambda b: b[:400]), "GGUF|incomplete"),
    "cut in the tensors": (raw(lambda b: b[:-5000]), "bounds|incomplete"),
    "last byte lost": (raw(lambda b: b[:-1]), "bounds|incomplete"),
    "a billion keys": (raw(lambda b: b[:16] + (1 << 30).to_bytes(8, "little") + b[24:]), "GGUF|incomplete"),
    "a billion tensors": (raw(lambda b: b[:8] + (1 << 30).to_bytes(8, "little") + b[16:]), "GGUF|incomplete"),
    "noise in the keys": (raw(lambda b: b[:100] + bytes(np.random.default_rng(0).integers(0, 256, 300, np.uint8)) + b[400:]), "capsule"),
    # not a capsule of this version
    "another adapter": (key("adapter.type", "lora", STR), "capsule"),
    "a newer format": (key("kvcapsule.version", 2), "version 2"),
    "no version": (without("kvcapsule.version"), "version"),
    "version is a string": (key("kvcapsule.version", "1", STR), "version"),
    # another model
    "another fingerprint": (key("kvcapsule.base.fingerprint", "0" * 64, STR), "fingerprint"),
    "no fingerprint": (without("kvcapsule.base.fingerprint"), "fingerprint"),
    "another number of heads": (key("kvcapsule.base.head_count_kv", [4, 4]), "head"),
    "another head size": (key("kvcapsule.base.key_length", [128, 128]), "head size|key_length"),
    "another number of layers": (key("kvcapsule.base.block_count", 3), "layers|block_count"),
    "another RoPE": (key("kvcapsule.base.rope.type", "neox", STR), "RoPE|rope"),
    "another architecture": (lambda good, bad: rewrite(good, bad, kv={
        "kvcapsule.base.architecture": ("qwen2", STR), "general.architecture": ("qwen2", STR)}), "architecture"),
    # numbers out of range
    "no block": (key("kvcapsule.block_size", 0), "block_size"),
    "a huge block": (key("kvcapsule.block_size", 1 << 31), "block_size"),
    "another block": (key("kvcapsule.block_size", 2 * N), "basis|token_order|shape"),
    "image of odd size": (key("kvcapsule.image_tokens", N + 1), "image_tokens"),
    "unknown shape": (key("kvcapsule.block_shape", "cube", STR), "shape"),
    "a layer too many": (key("kvcapsule.layers", [1, 2]), "layer"),
    "a layer twice": (key("kvcapsule.layers", [1, 1]), "layer"),
    "no rows": (key("kvcapsule.tier.key_rows", lambda v: [0] * 5 + v[5:]), "rows"),
    "more rows than tokens": (key("kvcapsule.tier.value_rows", at(0, N + 1)), "rows"),
    "rows that overflow": (key("kvcapsule.tier.value_rows", lambda v: [0xFFFFFFFF, 2, *v[2:]]), "rows"),
    "too few row counts": (key("kvcapsule.tier.key_rows", lambda v: v[:-1]), "key_rows"),
    "unknown codec": (key("kvcapsule.tier.key_codec", at(0, 7)), "codec"),
    "retain without its data": (key("kvcapsule.tier.key_codec", at(0, 1)), "retain|kept"),
    "kept without gates": (key("kvcapsule.kept_count", [N // 2, N // 2]), "gate|neighbour"),
    "all tokens kept": (key("kvcapsule.kept_count", [N, N]), "kept"),
    "an MLP without weights": (key("kvcapsule.mlp_width", [8, 8]), "mlp|MLP"),
    "too many neighbours": (key("kvcapsule.neighbour_count", 1000), "neighbour"),
    "token order": (key("kvcapsule.token_order", lambda v: [v[0], *v[:1], *v[2:]], gguf.GGUFValueType.UINT16), "token_order|permutation"),
    "NaN kappa": (key("kvcapsule.tier.kappa", at(1, float("nan")), F32), "kappa|finite"),
    "NaN ratio": (key("kvcapsule.default_ratio", float("nan"), F32), "ratio|finite"),
    "no faithful tier": (key("kvcapsule.tier.name", lambda v: ["a", *v[1:]], STR), "faithful"),
    # tensors
    "NaN in a basis": (tensor(K + "k_basis", put(np.nan, 3, 4)), "k_basis"),
    "infinite mean": (tensor(K + "v_mean", put(np.inf, 0, 1)), "v_mean"),
    "infinite weight": (tensor(K + "k_query_weight", put(-np.inf, 0, 0)), "k_query_weight"),
    "a flat basis": (tensor(K + "v_basis", lambda a: a.reshape(-1)), "v_basis"),
    "half a basis": (tensor(K + "v_basis", lambda a: np.ascontiguousarray(a[: N // 2])), "v_basis"),
    "basis in f16": (tensor(K + "v_basis", lambda a: a.astype(np.float16)), "v_basis"),
    **{f"no {t}": (without(K + t), t) for t in ("k_mean", "v_mean", "k_basis", "v_basis", "k_query_weight")},
    "a tensor too many": (lambda good, bad: rewrite(good, bad, add=[("blk.0.kvcapsule.extra", np.ones(4, np.float32))]), "extra"),
    "a foreign tensor": (lambda good, bad: rewrite(good, bad, add=[("blk.0.attn_q.weight", np.ones(4, np.float32))]), "attn_q"),
}


@pytest.fixture(scope="module")
def refusals(models, capsules, patched, tmp_path_factory) -> dict[str, StepResult]:
    """Loads all of them in one process, the good file before, between and after; then the good one is used."""
    folder = tmp_path_factory.mktemp("damaged")
    model = models(arch="llama")
    good = capsules(model, block_size=N)
    paths = {"good": good, "missing": folder / "missing.gguf", "a folder": folder}
    for name, (damage, _) in DAMAGES.items():
        paths[name] = folder / f"{name.replace(' ', '_')}.gguf"
        damage(good, paths[name])
    for name, other in {"another seed": models(arch="llama", seed=2), "another model": models(arch="qwen2"), "a model": None}.items():
        paths[name] = capsules(other, block_size=N) if other else model
    steps = [load_capsule(p) for p in paths.values()]
    result = patched([Case("load", model, [*steps, load_capsule(good)]),
                      Case("use", model, [text(5), image(2 * N), compress(), text(5), stats()], capsule=good)])
    assert not result["load"].error and not result["use"].error
    assert result["use"].values("stats")[0]["n_cold"] == 2 * N
    return {**dict(zip(paths, result["load"].steps)), "good again": result["load"].steps[-1]}


@pytest.mark.parametrize("name", ["good", "good again"])
def test_the_good_one_loads(refusals, name):
    assert refusals[name].values == {"loaded": True, "last_error": ""}


REASONS = {name: reason for name, (_, reason) in DAMAGES.items()} | {
    "missing": "open", "a folder": "capsule", "another seed": "fingerprint", "another model": "architecture", "a model": "capsule"}


@pytest.mark.parametrize("name", REASONS)
def test_refused_with_one_line(refusals, name):
    seen = refusals[name].values
    assert not seen["loaded"]
    line = seen["last_error"]
    assert line.strip() == line and line and len(line.splitlines()) == 1
    assert re.search(REASONS[name], line), line


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
