"""Any bytes are a capsule or one line, for both readers alike: the C++ loader and the state reader under sanitizers, the Python reader beside it.

`scripts/fuzz` runs the same harnesses as long as one likes; here they run for seconds, in the build that compares the two readers.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attacks.make import FILES
from hypothesis import HealthCheck, given, settings, strategies as st
from make_capsule import MIXED, random_capsule
from tile_damages import TILE_ACCEPTED, TILE_DAMAGES, WHOLE_ACCEPTED, WHOLE_DAMAGES

from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.tile_capsule import TileCapsule, read_tile_capsule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from fuzz_steps import build, corpus, run  # noqa: E402
from setup_steps.common import LLAMA  # noqa: E402

SOURCE = Path(os.environ.get("KVCAPSULE_TEST_SOURCE") or LLAMA / "patched" / "source")
CORPUS = sorted((corpus.SEEDS / "capsule").glob("*.gguf"))
SECONDS = 15  # of each target


@pytest.fixture(scope="module")
def compiler() -> build.Compiler:
    try:
        found = build.find_compiler()
    except build.FuzzError as e:
        pytest.skip(str(e))
    if not (SOURCE / "src" / "capsule" / "hooks.h").is_file():
        pytest.skip(f"no patched llama.cpp in {SOURCE}: run scripts/setup, or set KVCAPSULE_TEST_SOURCE")
    return replace(found, libfuzzer=False)  # shares its objects with print_capsule


@pytest.mark.parametrize("target", ["capsule", "state"])
def test_no_finding(compiler, target):
    outcome = run.run(target, build.build(target, SOURCE, compiler), compiler, runs=10_000_000, seconds=SECONDS, seed=1, quiet=True)
    print(outcome.line())
    assert outcome.runs > 1000


def test_the_driver_finds(compiler, tmp_path):
    """A harness with a bug: an input that breaks it is found and saved."""
    source = tmp_path / "bug.cpp"
    source.write_text("#include <cstdint>\n#include <cstddef>\nextern \"C\" int LLVMFuzzerTestOneInput(const uint8_t * d, size_t n) "
                      "{ static volatile int x; x = n == 3 ? d[n] : 0; return 0; }\n")  # fmt: skip
    program = tmp_path / "bug"
    subprocess.run([compiler.cxx, *build.SANITIZE, "-std=c++17", source, build.HARNESSES / "driver.cpp", "-o", program], check=True)
    (tmp_path / "seed").write_bytes(b"abcdef")
    p = subprocess.run([program, "-runs=100000", f"-artifact_prefix={tmp_path}/", tmp_path / "seed"], capture_output=True, text=True)
    assert p.returncode != 0 and "heap-buffer-overflow" in p.stderr
    assert len((tmp_path / "crash-input").read_bytes()) == 3


# --- both readers ---


def text(s: str) -> bytes:
    return struct.pack("<I", len(s)) + s.encode()


def packed(c: TileCapsule) -> bytes:
    """As print_capsule.cpp writes it."""
    out = [text(c.base.architecture), struct.pack("<I", c.base.block_count), text(c.base.rope_type), text(c.base.fingerprint)]
    out.append(struct.pack(f"<5I{len(c.smaller)}fI", c.rotated, *c.base.rope_sections, *c.smaller, c.first_tier))
    for x in c.layers:
        out.append(struct.pack("<5I2f", x.index, x.rope, *x.k_mean.shape, x.v_mean.shape[1], x.k_energy, x.v_energy))
    return b"".join(out)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def as_python_reads(path: Path) -> dict:
    try:
        c = read_tile_capsule(path)
    except CapsuleError as e:
        return {"refused": str(e)}
    tensors = []
    for x in c.layers:
        tensors += [digest(b"" if a is None else a.astype("<f4").tobytes()) for a in (x.k_mean, x.v_mean, x.v_axes)]
        tensors += [digest(b"" if a is None else a.tobytes()) for a in (x.k_table, x.v_table, x.narrow)]
    return {"metadata": digest(packed(c)), "tensors": tensors}


def compare(program: Path, paths: list[Path], same_line: bool = True) -> int:
    """The number of files that both accept; they must agree on every one. Where several things are wrong, the line may name another."""
    p = subprocess.run([program, *paths], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    lines = p.stdout.splitlines()
    assert len(lines) == len(paths)
    accepted = 0
    for path, line in zip(paths, lines):
        theirs, ours = json.loads(line), as_python_reads(path)
        if not same_line and "refused" in theirs and "refused" in ours:
            continue
        assert theirs == ours, path
        accepted += "refused" not in ours
    return accepted


@pytest.fixture(scope="module")
def printer(compiler) -> Path:
    return build.build("print_capsule", SOURCE, compiler)


def test_both_readers_agree_on_the_damaged(printer, models, tmp_path):
    model = models(arch="llama")
    good = random_capsule(model, tmp_path / "good.gguf", tiers=[(0, 1, 2, 3), MIXED, 32], narrow=[[1, 0]])
    whole = random_capsule(model, tmp_path / "whole.gguf", tiers=[MIXED], codec="retain", mlp=3)
    damages = [(good, d) for d in (*(d for d, _ in TILE_DAMAGES.values()), *TILE_ACCEPTED.values())]
    damages += [(whole, d) for d in (*(d for d, _ in WHOLE_DAMAGES.values()), *WHOLE_ACCEPTED.values())]
    paths = []
    for i, (file, damage) in enumerate(damages):
        paths.append(tmp_path / f"{i}.gguf")
        damage(file, paths[-1])
    # those that only do not fit the model, and the strange ones
    assert compare(printer, [good, *CORPUS, *FILES.iterdir(), *paths]) >= 1 + len(CORPUS) + len(TILE_ACCEPTED)


def test_both_readers_agree_on_the_mutated(printer, tmp_path):
    """Bytes and numbers of a few files changed at random: 1,500 files, the header hit more often than the data."""
    rng = np.random.default_rng(0)
    seeds = [p.read_bytes() for p in CORPUS]
    paths = []
    for i in range(1500):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.integers(1, 3)):
            where = int(rng.integers(0, len(data) if rng.random() < 0.4 else 2200) % len(data))
            width = int(rng.choice([1, 1, 1, 4, 8]))
            value = int(rng.choice([0, 1, 2, 8, 255, 1 << 31, (1 << 62) + 1, int(rng.integers(1 << 60))])) % (1 << (8 * width))
            data[where : where + width] = value.to_bytes(width, "little")
        if rng.random() < 0.1:
            del data[int(rng.integers(len(data))) :]
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(data)
    accepted = compare(printer, paths, same_line=False)
    print(f"{accepted} of {len(paths)} accepted by both")
    assert 0 < accepted < len(paths)


# --- the Python reader alone ---


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_python_reader(tmp_path, data):
    """Nothing but CapsuleError comes out, in little time and memory."""
    seed = data.draw(st.sampled_from([p.read_bytes() for p in CORPUS]))
    edits = st.tuples(st.integers(0, len(seed) - 1), st.one_of(st.binary(min_size=1, max_size=8), st.integers(0, 2**64 - 1).map(lambda v: v.to_bytes(8, "little"))))
    file = bytearray(seed)
    for where, piece in data.draw(st.lists(edits, min_size=1, max_size=4)):
        file[where : where + len(piece)] = piece
    path = tmp_path / "f.gguf"
    path.write_bytes(bytes(file) if data.draw(st.booleans()) else bytes(file)[: data.draw(st.integers(0, len(file)))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_tile_capsule(path)
    except CapsuleError as e:
        assert len(str(e).splitlines()) == 1 and str(e).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
