"""Which heads kvcapsule-train narrows: the rules, and the command on a tiny model. What the library measures is in test_narrow.py."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, library

from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule
from kvcapsule_gguf.train import narrow


def test_rules(models):
    base = read_base_model(models(arch="llama", n_layer=4))
    errors = np.full((20, 4, 2), 0.5)
    errors[:, 0, 1] = 0.001
    errors[:17, 1, 0] = 0.001  # 3 pictures of 20 are more than a tenth
    errors[:19, 1, 1] = 0.001
    assert [x.tolist() for x in narrow.narrowed(base, "measured", errors, 0.003)] == [[0, 1], [0, 1], [0, 0], [1, 1]]
    assert [x.tolist() for x in narrow.narrowed(base, "deeper-half", errors[:0], 0)] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(narrow.TrainError, match="no head was measured"):
        narrow.narrowed(base, "measured", errors[:0], 0.003)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from chat_model import write_mmproj, write_model

    folder = tmp_path_factory.mktemp("trained")
    write_model(folder / "tiny.gguf", arch="qwen2vl")
    write_mmproj(folder / "mmproj-tiny.gguf", arch="qwen2vl")

    def run(*arguments: object) -> tuple[str, object]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "KVCAPSULE_LIB": str(library("patched"))}
        command = [sys.executable, "-m", "kvcapsule_gguf.train", folder / "tiny.gguf", "-o", folder / "c.gguf", "--n-images", 3, "-c", 2048, "-t", 1, "--device", "cpu", *arguments]
        done = subprocess.run([str(x) for x in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stderr, read_tile_capsule(folder / "c.gguf")

    return run


def test_the_command(trained):
    """Nothing but the last layer is free at error 0, everything is at a huge one."""
    said, capsule = trained("--narrow-error", 0)
    assert [None if x.narrow is None else x.narrow.all() for x in capsule.layers] == [*[None] * (len(capsule.layers) - 1), True]
    assert "of the KV heads need no other picture while a picture is read" in said and capsule.provenance["narrow_pictures"] == 2
    said, capsule = trained("--narrow-error", 1e9)
    assert all(x.narrow.all() for x in capsule.layers) and "100% of the KV heads" in said
    _, capsule = trained("--narrow", "none")
    assert all(x.narrow is None for x in capsule.layers) and "narrow" not in capsule.provenance
