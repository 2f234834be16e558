"""kvcapsule-inspect, the converters, and capsules from arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, library
from make_capsule import MIXED, random_capsule
from PIL import Image
from synthetic_kv import source

from kvcapsule_gguf.codec.rope import apply_rope
from kvcapsule_gguf.format.capsule import CapsuleError, CapsuleFileError
from kvcapsule_gguf.format.checkpoint import KINDS, read_checkpoint, write_checkpoint
from kvcapsule_gguf.format.embed import embed
from kvcapsule_gguf.format.tile_capsule import TENSORS, read_tile_capsule, write_tile_capsule
from kvcapsule_gguf.train.arrays import fit_capsule, interleave
from kvcapsule_gguf.train.source import KVSample, TrainError


def run(*arguments: object, code: int = 0, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> tuple[Path, Path]:
    from chat_model import write_mmproj, write_model

    folder = tmp_path_factory.mktemp("vlm")
    return write_model(folder / "tiny.gguf"), write_mmproj(folder / "mmproj-tiny.gguf")


# --- checkpoints ---


@pytest.mark.parametrize(("axes", "codec"), [(True, "dct"), (False, "dct"), (True, "learned"), (True, "retain")])
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_to_safetensors_and_back_is_the_same_file(models, tmp_path, axes, codec, outtype):
    save = pytest.importorskip("safetensors.numpy")
    first = random_capsule(models(arch="llama"), tmp_path / "kvcapsule-a.gguf", tiers=((0, 1, 2, 3), MIXED, 8), axes=axes, codec=codec, mlp=8 * (codec == "retain"), narrow=[[1, 0]] * axes)
    script = "converters/convert_kvcapsule_to_gguf.py"
    done = run(script, "--reverse", first, "--outtype", outtype, "--outfile", tmp_path / "{ftype}.safetensors", "--base", models(arch="llama"))
    assert done.stdout == "" and f"{outtype}.safetensors" in done.stderr
    (tmp_path / f"{outtype}.safetensors").rename(tmp_path / "x.safetensors")
    tensors = save.load_file(tmp_path / "x.safetensors")
    assert ("layers.0.v_axes" in tensors) == axes and (not axes or tensors["layers.0.v_axes"].dtype == {"f16": np.float16, "f32": np.float32}[outtype])
    run(script, tmp_path / "x.safetensors", "--outfile", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == first.read_bytes()


def test_a_checkpoint_has_every_tensor_of_a_capsule():
    assert set(KINDS) == set(TENSORS)


def test_a_dry_run_writes_nothing(models, tmp_path):
    pytest.importorskip("safetensors")
    first = random_capsule(models(arch="llama"), tmp_path / "kvcapsule-a.gguf")
    done = run("converters/convert_kvcapsule_to_gguf.py", "--reverse", "--dry-run", first)
    assert "nothing written" in done.stderr and [p.name for p in tmp_path.iterdir()] == ["kvcapsule-a.gguf"]


def test_what_is_no_checkpoint_is_one_line(models, tmp_path):
    save = pytest.importorskip("safetensors.numpy")
    good = write_checkpoint(tmp_path / "good.safetensors", read_tile_capsule(random_capsule(models(arch="llama"), tmp_path / "a.gguf", codec="retain")))
    tensors = save.load_file(good)
    with __import__("safetensors").safe_open(good, framework="numpy") as f:
        metadata = f.metadata()
    wide = {**tensors, "layers.0.k_gate": tensors["layers.0.k_gate"].astype(np.float32) + 1e6}
    for tensors_, metadata_, reason in (
        (wide, metadata, "too large for float16"), (tensors, {}, "not a capsule checkpoint"), (tensors, {**metadata, "version": "9"}, "version 9"),
        (tensors, {**metadata, "config": "{"}, "config"), (tensors, {**metadata, "config": json.dumps({**json.loads(metadata["config"]), "layers": 5})}, "config"),
    ):  # fmt: skip
        save.save_file(tensors_, tmp_path / "bad.safetensors", metadata_ or None)
        with pytest.raises(CapsuleError, match=reason) as error:
            read_checkpoint(tmp_path / "bad.safetensors")
        assert "\n" not in str(error.value)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickled")
    done = run("converters/convert_kvcapsule_to_gguf.py", tmp_path / "bad.safetensors", code=1)
    assert len(done.stderr.splitlines()) == 1 and "can not be read as safetensors" in done.stderr


def test_bad_checkpoints_are_one_line(models, tmp_path):
    save = pytest.importorskip("safetensors.numpy")
    good = write_checkpoint(tmp_path / "good.safetensors", read_tile_capsule(random_capsule(models(arch="llama"), tmp_path / "a.gguf", tiers=(2, 4))))
    tensors = save.load_file(good)
    with __import__("safetensors").safe_open(good, framework="numpy") as f:
        metadata = f.metadata()
    config = json.loads(metadata["config"])

    def change(name, x):
        return {**tensors, f"layers.0.{name}": x}, config

    table, mean, axes = (tensors[f"layers.0.{name}"] for name in ("k_table", "k_mean", "v_axes"))
    for (tensors_, config_), reason in (
        (change("k_table", table + 3), "number of bits"), (change("k_table", table.astype(np.int32) + 256), "too large"),
        (change("k_table", table[:, :, 1:]), "shape"), (change("k_table", table.astype(np.float32)), "type float32"),
        (change("k_mean", mean * np.nan), "not finite"), (change("k_mean", mean[0]), "1 dimensions"),
        (change("v_axes", axes * np.float16(2)), "orthonormal"), (change("extra", mean), "unexpected tensor"),
        (({k: v for k, v in tensors.items() if k != "layers.1.v_mean"}, config), "layers.1.v_mean is missing"),
        ((tensors, {**config, "layers": []}), "no layers"), ((tensors, {**config, "rotated": 10**6}), "rope.dimension_count"),
        ((tensors, {**config, "rotated": -2}), "rotated"), ((tensors, []), "config"),
        ((tensors, {**config, "layers": [{**config["layers"][0], "k_energy": 0}, *config["layers"][1:]]}), "key_energy"),
    ):  # fmt: skip
        save.save_file(tensors_, tmp_path / "bad.safetensors", {**metadata, "config": json.dumps(config_)})
        with pytest.raises(CapsuleError, match=reason) as error:
            read_checkpoint(tmp_path / "bad.safetensors")
        assert "\n" not in str(error.value)


HOSTILE = (None, True, -1, 1.5, 2**32, 10**400, float("nan"), float("-inf"), "", "\ud800", "\x00", "x" * 70000, [], [[]], {}, [1, "x"], [float("nan")])


def leaves(x, path=()):
    """Every value in a JSON document, by its keys."""
    yield path
    for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield from leaves(x[key], (*path, key))


def changed(x, path, value):
    if not path:
        return value
    out = dict(x) if isinstance(x, dict) else list(x)
    out[path[0]] = changed(x[path[0]], path[1:], value)
    return out


def test_hostile_checkpoints(models, tmp_path):
    """Every value of the config in turn is something else, and every tensor of another type: refused with one line, or it is a capsule that can be written and read."""
    safetensors = pytest.importorskip("safetensors")
    from safetensors.numpy import load_file, save_file

    capsule = read_tile_capsule(random_capsule(models(arch="llama"), tmp_path / "a.gguf", codec="retain", mlp=4, tiers=(3, 8)))
    capsule.provenance = {"tool": "x", "images": 3, "share": 0.5}
    path = write_checkpoint(tmp_path / "good.safetensors", capsule)
    tensors = load_file(path)
    with safetensors.safe_open(path, framework="numpy") as f:
        metadata = f.metadata()
    config = json.loads(metadata["config"])
    places = [p for p in leaves(config) if not (p and p[0] == "layers" and len(p) > 1 and p[1] > 0)]
    configs = [json.dumps(changed(config, p, value)) for p in places for value in HOSTILE]
    configs += ["[" * 100_000, "null", "{}", json.dumps({**config, "provenance": {f"k{i}": i for i in range(1000)}})]
    types = [{**tensors, name: x.astype(kind)} for name, x in tensors.items() for kind in ("f8", "i1", "u8", "?") if not name.startswith("layers.1.")]
    types += [{**tensors, name: x[..., :0]} for name, x in tensors.items()]
    accepted = 0
    for changed_tensors, text in [*((tensors, c) for c in configs), *((t, metadata["config"]) for t in types)]:
        save_file(changed_tensors, path, {**metadata, "config": text})
        try:
            found = read_checkpoint(path)
        except CapsuleError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        accepted += 1
        again = read_tile_capsule(write_tile_capsule(tmp_path / "again.gguf", found))
        assert again.base == found.base and again.smaller == pytest.approx(found.smaller)
    assert 5 < accepted < len(configs) / 3  # names, provenance and such may be anything of their kind


# --- inside an mmproj ---

LOADS = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from kvcapsule_gguf.eval.vlm import Vlm
from PIL import Image
vlm = Vlm(Path({model!r}), Path({mmproj!r}), 1)
picture = vlm.read("", Image.new("RGB", (40, 40), "red"))
print(vlm.native.has_capsule, next(p for p in picture.parts if hasattr(p, "embd")).embd.tobytes().hex())
"""


def test_a_capsule_takes_the_place_of_another(vlm, tmp_path):
    model, mmproj = vlm
    capsule, both = random_capsule(model, tmp_path / "kvcapsule-tiny.gguf", tiers=(3, 8)), tmp_path / "mmproj-both.gguf"
    run("converters/embed_kvcapsule.py", mmproj, capsule, "--outfile", both)
    assert read_tile_capsule(both).provenance["name"] == read_tile_capsule(capsule).name
    run("converters/embed_kvcapsule.py", "--extract", both, "--outfile", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == capsule.read_bytes()
    first = random_capsule(model, tmp_path / "one.gguf")
    assert "takes its place" in run("converters/embed_kvcapsule.py", both, first, "--outfile", tmp_path / "one-inside.gguf").stderr
    assert len(read_tile_capsule(tmp_path / "one-inside.gguf").smaller) == 1


def test_embed_and_extract(vlm, tmp_path):
    """The capsule comes out as it went in, the projector computes the same in the unpatched library, and the chat finds the capsule there first."""
    model, mmproj = vlm
    capsule = random_capsule(model, tmp_path / "kvcapsule-tiny.gguf")
    both = tmp_path / "mmproj-both.gguf"
    before = mmproj.read_bytes()
    run("converters/embed_kvcapsule.py", mmproj, capsule, "--outfile", both)
    assert mmproj.read_bytes() == before
    run("converters/embed_kvcapsule.py", "--extract", both, "--outfile", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == capsule.read_bytes()
    again = run("converters/embed_kvcapsule.py", both, capsule, "--outfile", tmp_path / "twice.gguf")
    assert "takes its place" in again.stderr and (tmp_path / "twice.gguf").read_bytes() == both.read_bytes()

    for kind, known in (("stock", "False"), ("patched", "True")):
        lib = str(library(kind))
        if kind == "stock" and not any(library(kind).glob("*mtmd*")):
            continue  # scripts/setup builds libmtmd once: no patch touches it
        seen = [run("-c", LOADS.format(root=str(ROOT), model=str(model), mmproj=str(m)), KVCAPSULE_LIB=lib).stdout for m in (mmproj, both)]
        assert seen[0] == seen[1] and seen[0].startswith(known)

    from kvcapsule_gguf.chat.files import find_capsule
    from kvcapsule_gguf.format.fingerprint import fingerprint

    assert find_capsule("auto", model, both, "llama", fingerprint(model)) == both
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "p.png")
    done = run("-m", "kvcapsule_gguf.chat.cli", model, "--mmproj", both, "--image", tmp_path / "p.png", "-p", "what", "-n", 2, "-t", 1, "-c", 512, "--json",
               KVCAPSULE_LIB=str(library("patched")))
    answer = json.loads(done.stdout)
    assert answer["capsule"] and sum(answer["slots"].values()) == 1


def test_embedding_refuses(vlm, tmp_path):
    model, mmproj = vlm
    capsule = random_capsule(model, tmp_path / "kvcapsule-tiny.gguf")
    for arguments, reason in (
        ([model, capsule], "not a vision projector"), ([mmproj, mmproj], "not a capsule"), (["--extract", mmproj], "not a capsule"),
        ([mmproj, capsule, "--outfile", mmproj], "can not be written over"), ([tmp_path / "none", capsule], "No such file"),
        ([mmproj, capsule, "--outfile", model], "not a vision projector"),
    ):  # fmt: skip
        before = model.read_bytes(), mmproj.read_bytes()
        done = run("converters/embed_kvcapsule.py", *arguments, code=1)
        assert [line for line in done.stderr.splitlines() if "ERROR" in line and reason in line], done.stderr
        assert before == (model.read_bytes(), mmproj.read_bytes())


def test_a_capsule_replaces_nothing_but_a_capsule(vlm, tmp_path):
    capsule = read_tile_capsule(random_capsule(vlm[0], tmp_path / "c.gguf"))
    assert write_tile_capsule(tmp_path / "c.gguf", capsule).exists()
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    embed(vlm[1], capsule, tmp_path / "mmproj-c.gguf")  # holds a capsule, but is a projector
    for path in (*vlm, tmp_path / "mmproj-c.gguf", tmp_path / "notes", tmp_path / "link", tmp_path):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(CapsuleFileError, match="is there already and is no capsule"):
            write_tile_capsule(path, capsule)
        assert before == (path.read_bytes() if path.is_file() else None)


# --- inspect ---


def test_inspect_looks_inside_an_mmproj(vlm, tmp_path):
    model, mmproj = vlm
    path = random_capsule(model, tmp_path / "kvcapsule-tiny.gguf", tiers=(2, 8))
    run("converters/embed_kvcapsule.py", mmproj, path, "--outfile", tmp_path / "m.gguf")
    alone, inside = (json.loads(run("-m", "kvcapsule_gguf.inspect", p, "--json").stdout) for p in (path, tmp_path / "m.gguf"))
    assert inside["tiers"] == alone["tiers"] and len(alone["tiers"]) == 2


@pytest.mark.parametrize(("file", "reason"), [("none.gguf", "No such file"), (__file__, "not a GGUF file")])
def test_inspect_refuses_with_one_line(file, reason):
    done = run("-m", "kvcapsule_gguf.inspect", file, code=1)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and reason in done.stderr


# --- arrays ---


def test_the_channels_of_transformers(models):
    """Rotating half against half, then reordering, is reordering, then rotating neighbours."""
    x, at = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32), np.arange(5)
    for n in (16, 8):
        rotated = {kind: lambda y, kind=kind: apply_rope(y, at, rope_type=kind, freq_base=100.0, n=n) for kind in ("neox", "norm")}
        assert np.allclose(interleave(rotated["neox"](x), n), rotated["norm"](interleave(x, n)), atol=1e-5)


def test_arrays(models):
    """The keys of transformers, in their order, give the capsule of llama.cpp's order."""
    data = source(models(arch="llama"), 3)
    theirs = [replace(s, keys=[np.concatenate([k[..., 0::2], k[..., 1::2]], -1) for k in s.keys]) for s in data.samples]
    ours, found = fit_capsule(models(arch="llama"), data.samples), fit_capsule(models(arch="llama"), theirs, transformers_layout=True)
    assert found.provenance["images_from"] == "arrays" and found.provenance["images"] == 3
    for x, y in zip(ours.layers, found.layers):
        assert np.array_equal(x.k_mean, y.k_mean) and np.array_equal(x.k_table, y.k_table)


def test_arrays_of_another_model_are_one_line(models):
    good = source(models(arch="llama"), 4)
    s = good.samples[0]
    bad = replace(s, keys=[s.keys[0], s.keys[1] * np.nan])
    for sample, reason in (
        (KVSample(s.keys[:1], s.values), "keys of 1 layers"), (KVSample([k[:, :1] for k in s.keys], s.values), "keys have the shape"),
        (KVSample(s.keys, [v[:9] for v in s.values]), "9 values"), (bad, "layer 1 has keys that are not finite"),
    ):  # fmt: skip
        with pytest.raises(TrainError, match=reason):
            fit_capsule(models(arch="llama"), [*good.samples, sample])
