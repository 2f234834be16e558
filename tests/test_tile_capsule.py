"""Files of format v2: what is written comes back and codes as fitted, what is damaged is refused with one line."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import gguf
import numpy as np
import pytest
from conftest import library
from make_capsule import LOSSLESS, MIXED, random_capsule
from synthetic_kv import field, source
from tile_damages import NEEDS_THE_MODEL, TILE_ACCEPTED, TILE_DAMAGES, WHOLE_ACCEPTED, WHOLE_DAMAGES

from kvcapsule_gguf.format.capsule import CapsuleFileError
from kvcapsule_gguf.format.tile_capsule import KEYS, TileLayer, read_tile_capsule, write_tile_capsule
from kvcapsule_gguf.train.fit_tiles import SMALLER, fit_tile_capsule
from kvcapsule_gguf.train.source import TrainError


@pytest.fixture(scope="module")
def data(models):
    return source(models(arch="llama"), 3)


@pytest.fixture(scope="module")
def capsule(data):
    return fit_tile_capsule(data.model, data.samples)


@pytest.fixture(scope="module")
def good(capsule, tmp_path_factory):
    return write_tile_capsule(tmp_path_factory.mktemp("good") / "good.gguf", capsule)


def test_a_file_comes_back(capsule, good, tmp_path):
    again = read_tile_capsule(good)
    assert (again.base, again.rotated, again.name) == (capsule.base, capsule.rotated, capsule.name) and again.provenance == capsule.provenance
    for x, y in zip(capsule.layers, again.layers, strict=True):
        for f in fields(TileLayer):
            assert getattr(x, f.name) == pytest.approx(getattr(y, f.name)), f.name
    assert write_tile_capsule(tmp_path / "b.gguf", again).read_bytes() == good.read_bytes()


def test_tiers_are_as_small_as_they_say(capsule):
    assert capsule.smaller == sorted(capsule.smaller, reverse=True)
    assert capsule.smaller == pytest.approx(SMALLER, rel=0.05) and all(got >= 0.985 * want for got, want in zip(capsule.smaller, SMALLER))


def test_the_file_codes_a_tile_better_the_larger_the_tier(data, good):
    capsule = read_tile_capsule(good)
    for kind, part in (("k", data.samples[0].keys), ("v", data.samples[0].values)):
        tile = part[0].reshape(16, 16, *part[0].shape[1:])[:8, :8].reshape(64, *part[0].shape[1:])
        errors = []
        for tier in range(len(SMALLER)):
            each = [(h.decode(h.encode(tile[:, n], 8, 8), 8, 8), tile[:, n]) for n, h in enumerate(capsule.heads(0, kind, tier))]
            errors.append(sum(float(np.square(a - b).sum()) for a, b in each))
        assert errors[-1] < errors[4] < errors[0]


def test_the_keys_through_gguf_py(good):
    found = gguf.GGUFReader(good).fields
    names = {"u32": "UINT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING"}
    for name, (kind, array) in KEYS.items():
        expected = [gguf.GGUFValueType[names[kind]]]
        assert list(found[f"kvcapsule.{name}"].types[:2]) == ([gguf.GGUFValueType.ARRAY] if array else []) + expected, name


@pytest.mark.parametrize("change, reason", [
    (lambda x: x.k_table.__setitem__((0, 0, 5, 0), 7), "bits"),
    (lambda x: x.k_mean.__setitem__((0, 0), np.inf), "not finite"),
    (lambda x: x.v_mean.__setitem__((0, 0), 1e6), "too large"),
    (lambda x: x.v_axes.__setitem__((0, 0, 0), 3), "orthonormal"),
    (lambda x: setattr(x, "k_energy", 0.0), "key_energy"),
    (lambda x: setattr(x, "v_energy", float("nan")), "value_energy"),
])  # fmt: skip
def test_nothing_damaged_is_written(good, tmp_path, change, reason):
    capsule = read_tile_capsule(good)
    change(capsule.layers[1])
    with pytest.raises(CapsuleFileError, match=reason):
        write_tile_capsule(tmp_path / "bad.gguf", capsule)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_with_one_line(good, tmp_path):
    data, path = good.read_bytes(), tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(data)
        at = int(rng.integers(0, 2600))
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            read_tile_capsule(path)
        except CapsuleFileError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 75
    for n in (0, 10, 400, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:n])
        with pytest.raises(CapsuleFileError):
            read_tile_capsule(path)


@pytest.mark.parametrize("name", [*TILE_DAMAGES, *TILE_ACCEPTED])
def test_what_is_wrong_is_named(models, tmp_path, name):
    good, path = random_capsule(models(arch="llama"), tmp_path / "good.gguf", tiers=[(0, 1, 2, 3), MIXED, 32]), tmp_path / "bad.gguf"
    damage, reason = TILE_DAMAGES.get(name) or (TILE_ACCEPTED[name], None)
    damage(good, path)
    if reason is None or name in NEEDS_THE_MODEL:
        assert len(read_tile_capsule(path).layers) == 2
        return
    with pytest.raises(CapsuleFileError) as e:
        read_tile_capsule(path)
    assert re.search(reason, str(e.value)) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("name", [*WHOLE_DAMAGES, *WHOLE_ACCEPTED])
def test_what_is_wrong_with_a_transform_is_named(models, tmp_path, name):
    good, path = random_capsule(models(arch="llama"), tmp_path / "good.gguf", tiers=[MIXED], codec="retain", mlp=3), tmp_path / "bad.gguf"
    damage, reason = WHOLE_DAMAGES.get(name) or (WHOLE_ACCEPTED[name], None)
    damage(good, path)
    if reason is None:
        assert len(read_tile_capsule(path).layers) == 2
        return
    with pytest.raises(CapsuleFileError) as e:
        read_tile_capsule(path)
    assert re.search(reason, str(e.value)) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("codec", ["learned", "retain"])
def test_transforms_come_back(models, tmp_path, codec):
    path = random_capsule(models(arch="llama"), tmp_path / "a.gguf", tiers=[MIXED], codec=codec, mlp=2)
    capsule = read_tile_capsule(path)
    assert (capsule.layers[1].k_near is None) == (codec == "learned")
    assert write_tile_capsule(tmp_path / "b.gguf", capsule).read_bytes() == path.read_bytes()
    capsule.layers[1].v_transform *= 2
    with pytest.raises(CapsuleFileError, match="v_transform is not orthonormal"):
        write_tile_capsule(tmp_path / "c.gguf", capsule)


@pytest.mark.parametrize("codec", ["dct", "learned", "retain"])
@pytest.mark.parametrize("arch", ["llama", "qwen2vl", "smollm3"])
def test_lossless_tables_store_a_tile_as_it_is(models, tmp_path, arch, codec):
    capsule = read_tile_capsule(random_capsule(models(arch=arch), tmp_path / "a.gguf", tiers=LOSSLESS, codec=codec, mlp=2))
    assert capsule.smaller == [0.5]
    rng = np.random.default_rng(0)
    for kind in "kv":
        for head in capsule.heads(1, kind, 0):
            for h, w in ((8, 8), (3, 5), (1, 8), (1, 1)):
                x = field(rng, 8, (len(head.mean),))[: h * w]
                data = head.encode(x, h, w)
                assert len(data) == 4 * x.size and head.decode(data, h, w) == pytest.approx(x, abs=1e-5)


def test_a_picture_without_a_tile(data):
    small = [type(s)([k[:40] for k in s.keys], [v[:40] for v in s.values], s.queries, 5) for s in data.samples]
    with pytest.raises(TrainError, match="8 x 8"):
        fit_tile_capsule(data.model, small)


def test_one_picture_gives_no_axes(data):
    assert all(x.v_axes is None for x in fit_tile_capsule(data.model, data.samples[:1]).layers)
    assert all(x.v_axes is not None for x in fit_tile_capsule(data.model, data.samples[:2]).layers)


@pytest.mark.parametrize(("said", "kept"), [("Apache-2.0", "Apache-2.0"), ("", None), ("MIT\nand more", None), ("Lizenz für alle", None)])
def test_a_capsule_has_the_licence_of_its_model(capsule, tmp_path, said, kept):
    """Through gguf-py. What no reader would take under `general.` stays in the provenance."""
    path = write_tile_capsule(tmp_path / "c.gguf", replace(capsule, provenance={"license": said}))
    found = gguf.GGUFReader(path).fields.get("general.license")
    assert (found and found.contents()) == kept
    assert read_tile_capsule(path).provenance["license"] == said


def test_training_writes_a_capsule(tmp_path):
    library("patched")
    from kvcapsule_gguf.chat.files import demo_folder, model_in
    from kvcapsule_gguf.train.cli import main

    out = tmp_path / "two.gguf"
    assert main([str(model_in(demo_folder())), "--n-images", "4", "-t", "1", "-o", str(out)]) == 0
    capsule = read_tile_capsule(out)
    assert len(capsule.layers) == 8 and capsule.provenance["images"] == 4
    assert capsule.smaller == pytest.approx(SMALLER, rel=0.02)
    ours, builtin = (capsule.provenance[name] for name in ("smaller", "builtin_smaller"))
    assert 6.5 >= ours > 1.1 * builtin > 2
    assert gguf.GGUFReader(out).fields["general.license"].contents() == "MIT"


def test_inspect_says_what_is_in_it(good, tmp_path, capsys):
    from kvcapsule_gguf.inspect.cli import main

    assert main([str(good), "--json", "--plot", str(tmp_path / "p.png")]) == 0
    data, capsule = json.loads(capsys.readouterr().out), read_tile_capsule(good)
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert [tier["by_quality"] for tier in data["tiers"]] == [x <= 6.5 for x in SMALLER]
    for tier in data["tiers"]:
        layers = capsule.layers
        stored = sum(x["key_bits"] * layer.k_mean.size + x["value_bits"] * layer.v_mean.size for x, layer in zip(tier["layers"], layers)) * 64 / 8
        assert stored == pytest.approx(tier["bytes_per_tile"], rel=1e-3)
        assert tier["bytes_per_tile_f16"] / tier["bytes_per_tile"] == pytest.approx(tier["times_smaller"], rel=1e-3, abs=5e-3)
    assert main([str(good)]) == 0
    shown = capsys.readouterr().out
    assert f"{capsule.smaller[0]:.2f}x" in shown and capsule.base.fingerprint[:16] in shown
    with pytest.raises(SystemExit, match="2"):
        main([str(good), "--plot", str(tmp_path / "p.jpg")])
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-40])
    assert main([str(tmp_path / "cut.gguf")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
