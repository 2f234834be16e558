"""kvcapsule-bench: images get into caches without being decoded, and what it prints holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import library

from kvcapsule_gguf.bench.ik import WORKER
from kvcapsule_gguf.bench.timing import Ratio, speedup

SMALL = """
from pathlib import Path
import sys
import numpy as np
from kvcapsule_gguf import native
from kvcapsule_gguf.bench.compress import measure_compress
from kvcapsule_gguf.bench.context import Bench, Context
from kvcapsule_gguf.bench.fill import cache_rows
from kvcapsule_gguf.bench.geometry import Geometry
from kvcapsule_gguf.bench.run import Run
from kvcapsule_gguf.bench.settings import SETTINGS
from kvcapsule_gguf.bench.whole import measure_whole

folder = Path(sys.argv[1])
plain = Geometry("plain", "llama", 2, 4, 2, 64, 256, 256, n_vocab=64, side=8)
grid = Geometry("grid", "qwen3vl", 2, 4, 2, 64, 256, 256, n_vocab=64, rope="imrope", sections=(12, 10, 10, 0), qk_norm=True, side=8)
"""

FILLED = SMALL + """
for g in (plain, grid):
    rows = cache_rows(64, 128, "f16").view(np.float16).reshape(64, 2, 64).astype(np.float32)
    with Bench(g, Run(folder)) as bench:
        for name in ("f16 FA", "f16 no FA", "own f16"):
            context = Context(bench, SETTINGS[name], 2)
            _, v = native.read_kv(context.ctx, 1, (2, 64, 64))
            assert np.array_equal(v[-64:], rows), name
            context.close()
        compressed = Context(bench, SETTINGS["capsule"], 2)
        found = native.stats(compressed.ctx)
        assert (found.n_cold, found.n_hot_vision, sum(found.slots.values())) == (128, 0, 2)
        assert 4.5 < found.kv_bytes_f16 / found.kv_bytes < 5.5
        assert compressed.decode(1) > 0 and native.stats(compressed.ctx) == found
        compressed.close()
        mixed = Context(bench, SETTINGS["q8_0+q4_0 FA"], 1)
        assert mixed.kv_bytes() == 64 * 2 * 2 * 64 * 13 // 8 and mixed.decode(1) > 0  # tokens, layers, heads, channels of 8.5 and 4.5 bits
        mixed.close()
"""

# a clock that runs by what is done: 0.25 s for a token in the first context and 0.5 s in later ones, 2 s to compress an image
CLOCK = SMALL + """
now, seen = [0.0], {}
llama = native.load().llama
decode, compress = llama.llama_decode, native.compress

def counted_decode(ctx, batch):
    now[0] += batch.n_tokens * seen.setdefault(ctx, 0.5 if seen else 0.25)
    return decode(ctx, batch)

def counted_compress(ctx, *span):
    moved = compress(ctx, *span)
    now[0] += 2
    return moved

llama.llama_decode, native.compress = counted_decode, counted_compress
Run.clock = property(lambda self: lambda: now[0])
"""

WHOLE = CLOCK + """
rows = measure_whole(plain, 2, "capsule", ("f16 FA", "q4_0 FA", "q8_0+q4_0 FA"), Run(folder, rounds=3))
assert [(r.setting, r.tokens_per_s, r.first_token_s, r.token_ratio.times, r.first_token_ratio.times) for r in rows] == [
    ("capsule", 4, 16, 1, 1), ("f16 FA", 2, 32, 2, 2), ("q4_0 FA", 2, 32, 2, 2), ("q8_0+q4_0 FA", 2, 32, 2, 2),
]
f16 = 2 * 64 * 2 * 2 * 2 * 64 * 2  # bytes: images, tokens, layers, K and V, heads, channels of two bytes
assert [r.kv_bytes for r in rows[1:]] == [f16, f16 * 4.5 / 16, f16 * 6.5 / 16] and 4.5 < f16 / rows[0].kv_bytes < 5.5
for row, text in zip(rows, (f16, f16, f16 * 4.5 / 16, f16 * 6.5 / 16)):
    assert row.text_kv_bytes == (int(row.kv_bytes + text / 9), int(row.kv_bytes + text))  # a tenth and half of all tokens are text
"""

COMPRESS = CLOCK + """
for g in (plain, grid):
    for threads in (1, 2):
        seen.clear()
        (r,) = measure_compress(g, [SETTINGS["capsule"]], Run(folder, rounds=2, threads=threads))
        assert (r.geometry, r.setting, r.threads, r.tokens, r.layers) == (g.name, "capsule", threads, 64, 2)
        # of one of the two layers; a share of the 16 s that decoding the image takes
        assert (r.seconds, r.prefill_seconds, r.share) == (1, 8, 2 / 16)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def python(*arguments):
    env = os.environ | {"KVCAPSULE_LIB": str(library("patched")), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("script", [FILLED, WHOLE, COMPRESS], ids=["filled", "whole", "compress"])
def test_in_small(folder, script):
    done = python("-c", script, folder)
    assert done.returncode == 0, done.stderr


def test_attention(folder):
    picture = folder / "op.png"
    done = python("-m", "kvcapsule_gguf.bench", "op", "qwen2.5-vl-7b", "--tokens", 576, "-r", 3, "-s", "f16 FA,own f16,capsule",
                  "--folder", folder, "--plot", picture, "--json")
    assert done.returncode == 0, done.stderr
    rows = {r["setting"]: r for r in json.loads(done.stdout)}
    assert list(rows) == ["f16 FA", "own f16", "capsule"] and picture.stat().st_size > 1000
    for row in rows.values():
        assert row["tokens"] == 576 and set(row["faster_than"]) == {"f16 FA", "own f16", "capsule", "fastest of llama.cpp's"}
        assert row["faster_than"]["fastest of llama.cpp's"] == row["faster_than"]["f16 FA"]
        assert row["ns_per_token_and_head"] == pytest.approx(1e9 * row["seconds"] / (576 * 4))
    assert rows["f16 FA"]["kv_bytes"] == 576 * 4 * 512 and rows["f16 FA"]["faster_than"]["f16 FA"] == {"times": 1, "low": 1, "high": 1}
    assert 4.7 < rows["f16 FA"]["kv_bytes"] / rows["capsule"]["kv_bytes"] < 5.3


def test_ratios():
    """Rounds of 1, 2 and 4 times as fast: the median, and an interval between the least and the largest."""
    found = speedup([1.0, 1.0, 1.0], [1.0, 2.0, 4.0])
    assert found.times == 2 and found.low == 1 and found.high == 4
    assert speedup([2.0] * 5, [3.0] * 5) == Ratio(1.5, 1.5, 1.5)


# llama_data_write::write_kv_cache of ik_llama.cpp, read by its rules: cells, keys of all layers, values, and no recurrent states
IK_STATE = """
import importlib.util, json, struct, sys
sys.argv = ["ik_worker.py", "{}"]
spec = importlib.util.spec_from_file_location("ik_worker", {path!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
wanted = dict(layers=3, type_k=8, type_v=2, row_k=34, row_v=18)
data = worker.state(5, wanted)
at = 0
def take(form):
    global at
    at += struct.calcsize(form)
    return struct.unpack_from(form, data, at - struct.calcsize(form))
assert take("<I") == (5,)
assert [take("<iI") for _ in range(5)] == [(i, 0) for i in range(5)]
assert take("<II") == (0, 3)
for kind, row in ((8, 34), (2, 18)):
    for _ in range(3):
        assert take("<iQ") == (kind, row)
        for _ in range(5):
            assert 0 < take("<e")[0] < 1
            at += row - 2
assert take("<I") == (0,) and at == len(data)
"""


def test_the_state_of_ik_llama_cpp():
    done = python("-c", IK_STATE.replace("{path!r}", repr(str(WORKER))))
    assert done.returncode == 0, done.stderr


def test_compressing_the_demo_models_pictures():
    done = python("-m", "kvcapsule_gguf.bench", "compress", "demo", "-r", 1, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["geometry"], row["tokens"], row["layers"]) == ("demo", 576, 8)
    assert row["share"] == pytest.approx(row["seconds"] / row["prefill_seconds"]) and row["share"] < 1


@pytest.mark.parametrize(("arguments", "line"), [
    (("op", "gpt-5"), "kvcapsule-bench: error: no geometry 'gpt-5', there are: llava-1.5-7b, qwen2.5-vl-7b, qwen3-vl-8b"),
    (("compress", "gpt-5"), "kvcapsule-bench: error: no geometry 'gpt-5', there are: llava-1.5-7b, qwen2.5-vl-7b, qwen3-vl-8b, demo"),
    (("compress", "-s", "f16 FA"), "no 'f16 FA', there are: capsule"),
    (("op", "-s", "f8"), "no 'f8', there are: f16 FA"),
    (("model", "--images", "-1"), "'-1' is not a list of numbers from 0 on"),
    (("op", "--tokens", "0"), "'0' is not a list of numbers from 1 on"),
    (("op", "qwen3-vl-8b", "-s", "ik q8_0"), "kvcapsule-bench: error: ik q8_0: scripts/speed --ik installs ik_llama.cpp"),
    (("demo", "--model", "/nowhere"), "kvcapsule-bench: error: /nowhere: No such file or directory"),
])
def test_refused(arguments, line):
    done = python("-m", "kvcapsule_gguf.bench", *arguments)
    assert done.returncode != 0 and line in done.stderr and "Traceback" not in done.stderr
