"""kvcapsule-inspect, the converters, and capsules from arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, library
from make_capsule import MIXED, random_capsule
from PIL import Image
from synthetic_kv import source

from kvcapsule_gguf.codec.rope import apply_rope
from kvcapsule_gguf.format.capsule import CapsuleError, CapsuleFileError
from kvcapsule_gguf.format.checkpoint import read_checkpoint, write_checkpoint
from kvcapsule_gguf.format.embed import embed
from kvcapsule_gguf.format.reader import read_capsule
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule, write_any_capsule
from kvcapsule_gguf.format.writer import write_capsule
from kvcapsule_gguf.train.arrays import fit_capsule, interleave
from kvcapsule_gguf.train.source import KVSample, TrainError
from kvcapsule_gguf.train.trainer import TrainOptions


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


@pytest.mark.parametrize("options", [{}, {"key_codec": "retain", "mlp_width": 8, "lossless": False, "kappa": 2.5}])
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_to_safetensors_and_back_is_the_same_file(models, tmp_path, options, outtype):
    pytest.importorskip("safetensors")
    first = random_capsule(models(arch="llama"), tmp_path / "kvcapsule-a.gguf", **options)
    script = "converters/convert_kvcapsule_to_gguf.py"
    done = run(script, "--reverse", first, "--outtype", outtype, "--outfile", tmp_path / "x-{ftype}.safetensors", "--base", models(arch="llama"))
    assert done.stdout == "" and f"x-{outtype}.safetensors" in done.stderr
    run(script, tmp_path / f"x-{outtype}.safetensors", "--outfile", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("axes", [True, False])
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_format_v2_to_safetensors_and_back_is_the_same_file(models, tmp_path, axes, outtype):
    save = pytest.importorskip("safetensors.numpy")
    first = random_capsule(models(arch="llama"), tmp_path / "kvcapsule-a.gguf", tiers=((0, 1, 2, 3), MIXED, 8), axes=axes)
    script = "converters/convert_kvcapsule_to_gguf.py"
    run(script, "--reverse", first, "--outtype", outtype, "--outfile", tmp_path / "x.safetensors", "--base", models(arch="llama"))
    tensors = save.load_file(tmp_path / "x.safetensors")
    assert ("layers.0.v_axes" in tensors) == axes and (not axes or tensors["layers.0.v_axes"].dtype == {"f16": np.float16, "f32": np.float32}[outtype])
    run(script, tmp_path / "x.safetensors", "--outfile", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == first.read_bytes()


def test_a_dry_run_writes_nothing(models, tmp_path):
    pytest.importorskip("safetensors")
    first = random_capsule(models(arch="llama"), tmp_path / "kvcapsule-a.gguf")
    done = run("converters/convert_kvcapsule_to_gguf.py", "--reverse", "--dry-run", first)
    assert "nothing written" in done.stderr and [p.name for p in tmp_path.iterdir()] == ["kvcapsule-a.gguf"]


def test_bad_checkpoints_are_one_line(models, tmp_path):
    save = pytest.importorskip("safetensors.numpy")
    capsule = read_capsule(random_capsule(models(arch="llama"), tmp_path / "a.gguf", key_codec="retain"))
    good = write_checkpoint(tmp_path / "good.safetensors", capsule)
    tensors = save.load_file(good)
    with __import__("safetensors").safe_open(good, framework="numpy") as f:
        metadata = f.metadata()
    nan = {**tensors, "layers.0.v_mean": tensors["layers.0.v_mean"] * np.nan}
    wide = {**tensors, "layers.0.k_gate": tensors["layers.0.k_gate"].astype(np.float32) + 1e6}
    cut = {**tensors, "layers.0.k_basis": tensors["layers.0.k_basis"][:-1]}
    config = json.loads(metadata["config"])
    for tensors_, metadata_, reason in (
        ({k: v for k, v in tensors.items() if k != "layers.1.k_mean"}, metadata, "layers.1.k_mean is missing"),
        ({**tensors, "extra": np.zeros(3, np.float32)}, metadata, "unexpected tensor extra"),
        (nan, metadata, "not finite"), (wide, metadata, "too large for float16"), (cut, metadata, "shape"),
        (tensors, {}, "not a capsule checkpoint"), (tensors, {**metadata, "version": "9"}, "version 9"),
        (tensors, {**metadata, "config": "{"}, "config"), (tensors, {**metadata, "config": json.dumps({**config, "block_size": 10**9})}, "block_size"),
        (tensors, {**metadata, "config": json.dumps({**config, "layers": 5})}, "config"),
    ):  # fmt: skip
        save.save_file(tensors_, tmp_path / "bad.safetensors", metadata_ or None)
        with pytest.raises(CapsuleError, match=reason) as error:
            read_checkpoint(tmp_path / "bad.safetensors")
        assert "\n" not in str(error.value)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickled")
    done = run("converters/convert_kvcapsule_to_gguf.py", tmp_path / "bad.safetensors", code=1)
    assert len(done.stderr.splitlines()) == 1 and "can not be read as safetensors" in done.stderr


def test_bad_checkpoints_of_format_v2_are_one_line(models, tmp_path):
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

    capsule = read_capsule(random_capsule(models(arch="llama"), tmp_path / "a.gguf", key_codec="retain", lossless=False))
    capsule.provenance = {"tool": "x", "images": 3, "share": 0.5, "key_error": [0.25, 0.5]}
    path = write_checkpoint(tmp_path / "good.safetensors", capsule)
    tensors = load_file(path)
    with safetensors.safe_open(path, framework="numpy") as f:
        metadata = f.metadata()
    config = json.loads(metadata["config"])
    places = [p for p in leaves(config) if not (p and p[0] == "layers" and len(p) > 1 and p[1] > 0)]
    configs = [json.dumps(changed(config, p, value)) for p in places for value in HOSTILE]
    configs += ["[" * 100_000, "null", "{}", json.dumps({**config, "provenance": {f"k{i}": i for i in range(1000)}})]
    types = [{**tensors, name: x.astype(kind)} for name, x in tensors.items() for kind in ("f8", "i1", "u8", "?") if not name.startswith("layers.1.")]
    types += [{**tensors, name: x[..., :0]} for name, x in tensors.items()] + [{**tensors, "layers.0.token_order": tensors["layers.0.token_order"] + 65536}]
    accepted = 0
    for changed_tensors, text in [*((tensors, c) for c in configs), *((t, metadata["config"]) for t in types)]:
        save_file(changed_tensors, path, {**metadata, "config": text})
        try:
            found = read_checkpoint(path)
        except CapsuleError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        accepted += 1
        again = read_capsule(write_capsule(tmp_path / "again.gguf", found))
        assert (again.base, again.block_size, [t.name for t in again.tiers]) == (found.base, found.block_size, [t.name for t in found.tiers])
    assert 20 < accepted < len(configs) / 3  # names, provenance and such may be anything of their kind


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


def test_embed_and_extract_format_v2(vlm, tmp_path):
    model, mmproj = vlm
    capsule, both = random_capsule(model, tmp_path / "kvcapsule-tiny.gguf", tiers=(3, 8)), tmp_path / "mmproj-both.gguf"
    run("converters/embed_kvcapsule.py", mmproj, capsule, "--outfile", both)
    assert read_tile_capsule(both).provenance["name"] == read_tile_capsule(capsule).name
    run("converters/embed_kvcapsule.py", "--extract", both, "--outfile", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == capsule.read_bytes()
    first = random_capsule(model, tmp_path / "one.gguf")
    assert "takes its place" in run("converters/embed_kvcapsule.py", both, first, "--outfile", tmp_path / "one-inside.gguf").stderr
    assert read_capsule(tmp_path / "one-inside.gguf").tiers and write_any_capsule(tmp_path / "two.gguf", read_tile_capsule(both)).exists()


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
    capsule = read_capsule(write_capsule(tmp_path / "c.gguf", read_capsule(random_capsule(vlm[0], tmp_path / "c.gguf"))))
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    embed(vlm[1], capsule, tmp_path / "mmproj-c.gguf")  # holds a capsule, but is a projector
    for path in (*vlm, tmp_path / "mmproj-c.gguf", tmp_path / "notes", tmp_path / "link", tmp_path):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(CapsuleFileError, match="is there already and is no capsule"):
            write_capsule(path, capsule)
        assert before == (path.read_bytes() if path.is_file() else None)


# --- inspect ---


def test_inspect(vlm, tmp_path):
    model, mmproj = vlm
    path = write_capsule(tmp_path / "c.gguf", fit_capsule(model, source(model, 6).samples, TrainOptions(), say=lambda line: None))
    done = run("-m", "kvcapsule_gguf.inspect", path, "--plot", tmp_path / "p.png")
    assert "uniform" in done.stdout and "arrays" in done.stdout and "faithful" in done.stdout and done.stderr == ""
    assert Image.open(tmp_path / "p.png").size[0] > 1000  # two panels
    data = json.loads(run("-m", "kvcapsule_gguf.inspect", path, "--json").stdout)
    capsule = read_capsule(path)
    default = next(t for t in data["presets"] if t["name"] == data["default_preset"])
    assert default["times_smaller"] == pytest.approx(5, abs=0.1)
    assert default["bytes_per_image"] == capsule.slot_bytes(2) * 256 // 64 and default["bytes_per_image_f16"] == 256 * 2 * 2 * sum(
        x.head_count_kv * x.key_length for x in capsule.layers
    )
    errors = [t["layers"][0]["value_error"] for t in data["presets"]]
    assert 0 < errors[1] < errors[2] < errors[3] < 1
    run("converters/embed_kvcapsule.py", mmproj, path, "--outfile", tmp_path / "m.gguf")
    inside = json.loads(run("-m", "kvcapsule_gguf.inspect", tmp_path / "m.gguf", "--json").stdout)
    assert inside["presets"] == data["presets"]


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


def test_arrays_of_another_model_are_one_line(models):
    good = source(models(arch="llama"), 4)
    s = good.samples[0]
    for sample, reason in (
        (KVSample(s.keys[:1], s.values, s.queries), "keys of 1 layers"), (KVSample([k[:, :1] for k in s.keys], s.values, s.queries), "keys have the shape"),
        (KVSample(s.keys, [v[:9] for v in s.values], s.queries), "9 values"),
    ):  # fmt: skip
        with pytest.raises(TrainError, match=reason):
            fit_capsule(models(arch="llama"), [*good.samples, sample], say=lambda line: None)
    with pytest.raises(TrainError, match="running model"):
        fit_capsule(models(arch="llama"), good.samples, TrainOptions(layers="sensitivity"), say=lambda line: None)
