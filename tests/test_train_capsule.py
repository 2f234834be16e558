"""kvcapsule-train: its pictures, and the command from end to end. What a fit must do is in test_tile_capsule."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, library
from PIL import Image

from kvcapsule_gguf.eval.pictures import UnreadablePicture, from_folder, readable
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule
from kvcapsule_gguf.runtime.errors import KVCapsuleError
from kvcapsule_gguf.train.images import Drawn


def test_drawn_pictures():
    """As many as asked for, the same for the same seed, different from each other."""
    a, b, c = ([p.image for p in Drawn(6, seed)] for seed in (0, 0, 1))
    assert len(a) == 6 and all(i.mode == "RGB" for i in a)
    assert [i.tobytes() for i in a] == [i.tobytes() for i in b] != [i.tobytes() for i in c]
    assert len({i.tobytes() for i in a}) == 6
    assert all(np.asarray(p.image).std() > 3 for p in Drawn(24, 3))
    assert [bool(p.questions) for p in Drawn(4, 0)] == [True, False, True, False]
    sizes = [p.image.size for p in Drawn(12, 0, any_size=True)]
    assert len(set(sizes)) == 12 and all(252 <= side <= 560 for size in sizes for side in size)


def test_a_folder_of_pictures(tmp_path):
    with pytest.raises(KVCapsuleError, match="not a folder"):
        list(from_folder(tmp_path / "none", 4, 0))
    with pytest.raises(KVCapsuleError, match="no pictures"):
        list(from_folder(tmp_path, 4, 0))
    (tmp_path / "sub").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "sub" / f"{i}.png")
    assert sorted(p.image.getpixel((0, 0))[0] for p in from_folder(tmp_path, 9, 0)) == [0, 1, 2]
    assert len(list(from_folder(tmp_path, 2, 0))) == 2
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UnreadablePicture, match="broken.jpg"):
        list(from_folder(tmp_path, 9, 0))
    said = []
    assert len(list(readable(from_folder(tmp_path, 9, 0), say=said.append))) == 3
    assert len(said) == 1 and "broken.jpg" in said[0]


# --- the command ---


def command(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kvcapsule_gguf.train", *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none.gguf", "--mmproj", "none.gguf"], "none.gguf is not a file"),
        ([__file__, "--mmproj", __file__], f"model '{__file__}': not a GGUF file"),
        ([__file__], f"no mmproj*.gguf beside {__file__}: name it with --mmproj"),
        ([__file__, "--mmproj", __file__, "--images", "none"], "none is not a folder"),
        ([__file__, "--mmproj", __file__, "--n-images", "1"], "--n-images 1 is too few: at least 2, and 4 have most of the gain"),
        ([__file__, "--mmproj", __file__, "-o", "/none/out.gguf"], "/none is not a folder"),
        ([__file__, "--mmproj", __file__, "-o", __file__], f"capsule '{__file__}': is there already and is no capsule: choose another name, or remove it first"),
        ([__file__, "--mmproj", __file__, "-o", "/"], "capsule '/': is there already and is no capsule: choose another name, or remove it first"),
    ],
)
def test_the_command_refuses_with_one_line(arguments, line):
    done = command(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"kvcapsule-train: error: {line}\n")


def test_the_command_from_end_to_end(tmp_path):
    """A tiny model, a folder with a file that is no picture and a panorama of one row of tokens, which has no tile: the others are learned from, and the capsule is used."""
    from chat_model import write_mmproj, write_model

    env = {"OMP_NUM_THREADS": "1", "KVCAPSULE_LIB": str(library("patched"))}
    model, mmproj = write_model(tmp_path / "tiny.gguf", arch="qwen2vl"), write_mmproj(tmp_path / "mmproj-tiny.gguf", arch="qwen2vl")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.effect_noise((300, 300), 40 + 20 * i).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    Image.effect_noise((4004, 28), 60).convert("RGB").save(tmp_path / "pictures" / "panorama.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "c.gguf"
    done = command(model, "--mmproj", mmproj, "-o", out, "--images", tmp_path / "pictures", "-c", 2048, "-t", 1, "--device", "cpu", **env)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "skipped" in done.stderr and "broken.png" in done.stderr and "looked at 5 pictures" in done.stderr and "without a file" in done.stderr
    said = read_tile_capsule(out).provenance
    assert (said["images"], said["images_from"], said["seed"]) == (4, "folder", 0) and said["smaller"] > said["builtin_smaller"] > 1
    arguments = [model, "--capsule", out, "--ratio", "0.8", "--against", "f16", "-n", 4, "-c", 2048, "-t", 1, "--json"]
    done = subprocess.run([sys.executable, "-m", "kvcapsule_gguf.eval", *map(str, arguments)], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)["settings"][-1]
    assert sum(ours["slots"].values()) > 0 and ours["kld"] < 0.1 and ours["kv_ratio"] == pytest.approx(0.8, abs=0.1)


def test_training_needs_no_torch(tmp_path):
    from chat_model import write_mmproj, write_model

    model, _ = write_model(tmp_path / "tiny.gguf", arch="qwen2vl"), write_mmproj(tmp_path / "mmproj-tiny.gguf", arch="qwen2vl")
    arguments = [str(x) for x in (model, "-o", tmp_path / "c.gguf", "--n-images", 2, "-c", 1024, "-t", 1)]
    code = f"import sys; sys.modules['torch'] = None; from kvcapsule_gguf.train.cli import main; sys.exit(main({arguments!r}))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KVCAPSULE_LIB": str(library("patched"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "c.gguf").exists(), done.stderr


def test_the_command_on_the_demo_model(tmp_path):
    demo = ROOT / "kvcapsule_gguf" / "demo"
    model, mmproj = demo / "kvdemo-8M-v1-F16.gguf", demo / "mmproj-kvdemo-8M-v1-F16.gguf"
    out = tmp_path / "c.gguf"
    done = command(model, "--mmproj", mmproj, "-o", out, "--n-images", 2, "-t", 1, OMP_NUM_THREADS="1", KVCAPSULE_LIB=str(library("patched")))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    capsule = read_tile_capsule(out)
    assert len(capsule.layers) == 8 and capsule.smaller[0] > 9 and all(x.v_axes is not None for x in capsule.layers)
