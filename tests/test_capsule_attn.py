"""Attention over tiles of format v2 (ggml-capsule/attn.h): the kernels of this machine and plain C++ against f64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import native_code
import numpy as np
import pytest

from kvcapsule_gguf.codec.builtin import builtin_table
from kvcapsule_gguf.codec.channels import key_groups, plain_groups
from kvcapsule_gguf.codec.head import F16, row_blocks
from kvcapsule_gguf.codec.rope import pair_index
from kvcapsule_gguf.codec.tiles import transform

WIDTH = 24  # of a picture, in tokens
P = ctypes.c_void_p


class Problem(ctypes.Structure):
    """tests/native/capsule_attn.cpp"""

    _fields_ = [(n, ctypes.c_int32) for n in ("d_k", "n_rot", "halves", "d_v", "n_head_kv", "n_gqa", "n_tokens", "n_slots")] + [
        (n, P) for n in ("shapes", "k_table", "v_table", "k_mean", "v_mean", "v_axes", "k", "v", "steps", "angles", "q", "seen", "mask")
    ]


@dataclass
class Case:
    """Random K and V whose tokens are alike, as those of pictures; loud: a channel of the mean and its size in units of the rms; wild: some tokens are 30 times larger."""

    d_k: int = 128
    d_v: int = 128
    rotated: int = 128
    halves: bool = False
    heads: int = 2
    gqa: int = 1
    tokens: int = 1
    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(8, 8)] * 6)
    bits: float | str = 16 / 5
    loud: float = 0.5
    wild: bool = False
    axes: bool = False
    sections: tuple[int, int, int] | None = None  # M-RoPE: pairs that turn with time, lines, columns
    seen: str = "all"
    sharp: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng(self.seed)
        n, rows = len(self.shapes), self.tokens * self.gqa
        self.k, self.v = (self._tokens(d, size) for d, size in ((self.d_k, 1.0), (self.d_v, 0.5)))
        self.k_mean = rng.standard_normal((self.heads, self.d_k)).astype(np.float32) * 0.5
        self.k_mean[:, 5] += self.loud
        self.v_mean = rng.standard_normal((self.heads, self.d_v)).astype(np.float32) * 0.2
        self.k += self.k_mean[:, None]
        self.v += self.v_mean[:, None]
        self.v_axes = None
        if self.axes:
            self.v_axes = np.stack([np.linalg.qr(rng.standard_normal((self.d_v, self.d_v)))[0] for _ in range(self.heads)]).astype(np.float32)
        groups = key_groups(self.d_k, "neox" if self.halves else "norm", self.rotated) if self.rotated else plain_groups(self.d_k)
        self.k_table, self.v_table = (self._tables(len(g)) for g in (groups, plain_groups(self.d_v)))
        pairs = self.rotated // 2
        theta = 1e4 ** (-2 * np.arange(pairs) / max(self.rotated, 1))
        if self.sections:
            axis = np.repeat([0, 1, 2], self.sections)
            self.steps = np.stack([np.where(axis == 2, theta, 0), np.where(axis == 1, theta, 0)])
            self.angles = theta * np.stack([rng.integers(0, 500, 3)[axis] for _ in range(n)])
        else:
            self.steps = np.stack([theta, WIDTH * theta])
            self.angles = theta * rng.integers(0, 20000, n)[:, None]
        self.q = (rng.standard_normal((self.tokens, self.heads * self.gqa, self.d_k)) * self.sharp * self.d_k**-0.5).astype(np.float32)
        self.visible = np.ones((self.tokens, n), np.uint8)
        self.mask = np.zeros((self.tokens, n * 64), np.float16)
        if self.seen != "all":
            self.visible = rng.integers(0, 3, (self.tokens, n)).astype(np.uint8)
            self.mask[rng.random(self.mask.shape) < 0.5] = -np.inf
            self.mask[:, :64] = -np.inf  # a slot that is hidden by the mask alone
            self.visible[:, 0] = 2
            if self.seen == "one":
                self.visible[:], self.visible[:, -1] = 0, 1
        self.rows = rows

    def _tokens(self, d: int, size: float) -> np.ndarray:
        out = np.zeros((len(self.shapes), self.heads, 64, d), np.float32)
        for i, (h, w) in enumerate(self.shapes):
            noise = self.rng.standard_normal((self.heads, h * w, d)) * 0.5
            u, v = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
            smooth = sum(
                self.rng.standard_normal((self.heads, 1, d)) * np.cos(np.pi * (u.ravel() + 0.5) * a / h)[:, None] * np.cos(np.pi * (v.ravel() + 0.5) * b / w)[:, None]
                for a in range(min(h, 3)) for b in range(min(w, 3))
            )  # fmt: skip
            x = noise + smooth * 0.6
            if self.wild:
                x[:, self.rng.integers(0, h * w, 1)] *= 30
            out[i, :, : h * w] = x * size
        return out

    def _tables(self, groups: int) -> np.ndarray:
        if self.bits == "random":
            table = self.rng.choice([0, 1, 2, 3, 4, 6, 8, F16], (self.heads, 33, groups), p=[0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.05, 0.05])
            table[:, 0] = self.rng.choice([3, 8, F16], (self.heads, groups))
            return table.astype(np.uint8)
        return np.stack([builtin_table(self.bits, groups)] * self.heads)


@dataclass
class Result:
    max: np.ndarray
    sum: np.ndarray
    out: np.ndarray  # [heads, rows, d_v], divided by the sums
    scores: np.ndarray  # [heads, slots, rows, 64]
    k: np.ndarray
    v: np.ndarray


@dataclass
class Emulated:
    """The library as a program for another processor: arrays go in and come out as their sizes and bytes."""

    command: list[str]

    def attn(self, sizes: bytes, inputs: list[np.ndarray | None], plain: bool, arrays: list[np.ndarray | None]) -> None:
        data = [sizes, *inputs, np.int32(plain), *arrays]
        raw = [b"" if x is None else x if isinstance(x, bytes) else x.tobytes() for x in data]
        done = subprocess.run(self.command, input=b"".join(len(x).to_bytes(8, "little") + x for x in raw), stdout=subprocess.PIPE, check=True, timeout=300).stdout
        for x in arrays:
            if x is not None:
                x[...] = np.frombuffer(done[: x.nbytes], x.dtype).reshape(x.shape)
                done = done[x.nbytes :]


def run(lib: ctypes.CDLL | Emulated, case: Case, plain: bool, start: tuple[float, float, float] = (-np.inf, 0, 0)) -> Result:
    c = case
    keep = {
        "shapes": np.array(c.shapes, np.int32), "k_table": c.k_table, "v_table": c.v_table, "k_mean": c.k_mean, "v_mean": c.v_mean, "v_axes": c.v_axes,
        "k": c.k, "v": c.v, "steps": c.steps, "angles": c.angles, "q": c.q, "seen": None if c.seen == "all" else c.visible, "mask": c.mask,
    }  # fmt: skip
    keep = {name: None if x is None else np.ascontiguousarray(x) for name, x in keep.items()}
    problem = Problem(c.d_k, c.rotated, c.halves, c.d_v, c.heads, c.gqa, c.tokens, len(c.shapes), *(None if x is None else x.ctypes.data for x in keep.values()))
    shape = (c.heads, c.rows)
    r = Result(
        np.full(shape, start[0], np.float32), np.full(shape, start[1], np.float32), np.full((*shape, c.d_v), start[2], np.float32),
        np.zeros((c.heads, len(c.shapes), c.rows, 64), np.float32), np.zeros_like(c.k), np.zeros_like(c.v),
    )  # fmt: skip
    arrays = [r.max, r.sum, r.out, r.scores if c.rows <= 8 and c.seen == "all" else None, r.k, r.v]
    if isinstance(lib, Emulated):
        lib.attn(bytes(problem)[: Problem.shapes.offset], list(keep.values()), plain, arrays)
    else:
        lib.attn(ctypes.byref(problem), int(plain), *(None if a is None else a.ctypes.data_as(P) for a in arrays))
    return r


def truth(c: Case, k: np.ndarray, v: np.ndarray, start: tuple[float, float, float] = (-np.inf, 0, 0)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64 scores [heads, slots, rows, 64], logarithm of the sum of the weights [heads, rows], outputs [heads, rows, d_v]."""
    turned = k.astype(np.float64)
    if c.rotated:
        first, second = pair_index("neox" if c.halves else "norm", c.rotated).T
        for i, (_, w) in enumerate(c.shapes):
            y, x = np.divmod(np.arange(64), w)
            angle = c.angles[i] + x[:, None] * c.steps[0] + y[:, None] * c.steps[1]
            a, b = turned[i][..., first].copy(), turned[i][..., second].copy()
            turned[i][..., first] = a * np.cos(angle) - b * np.sin(angle)
            turned[i][..., second] = a * np.sin(angle) + b * np.cos(angle)
    q = c.q.reshape(c.tokens, c.heads, c.gqa, c.d_k).swapaxes(0, 1).reshape(c.heads, c.rows, c.d_k).astype(np.float64)
    scores = np.einsum("hrd,ihtd->hirt", q, turned)
    seen = scores.copy()
    for i, (h, w) in enumerate(c.shapes):
        seen[:, i, :, h * w :] = -np.inf
        for row in range(c.rows):
            which = c.visible[row // c.gqa, i]
            if which == 0:
                seen[:, i, row] = -np.inf
            elif which == 2:
                seen[:, i, row] += c.mask[row // c.gqa, 64 * i : 64 * i + 64]
    flat = seen.swapaxes(1, 2).reshape(c.heads, c.rows, -1)
    most = np.maximum(flat.max(-1, keepdims=True), start[0])
    p = np.exp(flat - most)
    before = np.exp(start[0] - most[..., 0])
    total = p.sum(-1) + start[1] * before
    out = (np.einsum("hrn,hnd->hrd", p, v.astype(np.float64).swapaxes(0, 1).reshape(c.heads, -1, c.d_v)) + start[2] * before[..., None]) / total[..., None]
    return scores, most[..., 0] + np.log(total), out


def errors(lib: ctypes.CDLL | Emulated, c: Case, plain: bool, start: tuple[float, float, float] = (-np.inf, 0, 0)) -> tuple[float, float, float]:
    """Of scores, relative to their deviation; of the logarithm of the sum; of outputs, relative to the deviation of values."""
    r = run(lib, c, plain, start)
    scores, total, out = truth(c, r.k, r.v, start)
    got = r.out / r.sum[..., None]
    n = np.array([h * w for h, w in c.shapes])
    real = np.broadcast_to((np.arange(64) < n[:, None])[None, :, None], scores.shape)
    of_scores = float("nan")
    if not plain and c.rows <= 8 and c.seen == "all":
        of_scores = float((r.scores - scores)[real].std() / scores[real].std())
    of_sums = float(np.abs(r.max + np.log(r.sum) - total).max())
    return of_scores, of_sums, float(np.sqrt(np.square(got - out).mean() / np.square(out - c.v_mean[:, None]).mean()))


FLAGS = {"avx2": ("-mavx2", "-mfma", "-mf16c"), "native": ("-march=native",)}


@pytest.fixture(scope="module", params=[*FLAGS, "neon"])
def lib(request, tmp_path_factory) -> ctypes.CDLL | Emulated:
    if request.param == "neon":
        cxx, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if not cxx or not emulator:
            pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
        program = native_code.tiles("capsule_attn", tmp_path_factory.mktemp("attn"), "-DCAPSULE_ATTN_PROGRAM", cxx=cxx, kind=["-static"])
        return Emulated([emulator, str(program)])
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the kernels need AVX2")
    return ctypes.CDLL(str(native_code.tiles("capsule_attn", tmp_path_factory.mktemp("attn"), *FLAGS[request.param])))


CASES = {
    "LLaVA-1.5-7B": Case(),
    "32/8": Case(gqa=4),
    "28/4": Case(gqa=7, halves=True),
    "several tokens": Case(gqa=4, tokens=5, halves=True),
    "short tiles": Case(gqa=4, shapes=[(8, 3), (3, 8), (5, 7), (1, 6), (1, 1), (2, 2), (7, 4), (6, 6), (8, 8), (4, 1), (8, 5)]),
    "one query, short tiles": Case(shapes=[(h, 9 - h) for h in range(1, 9)], heads=1),
    "all types": Case(gqa=2, bits="random", seed=3),
    "all types, one query": Case(bits="random", seed=4, heads=3),
    "axes": Case(axes=True, gqa=2),
    "a loud channel": Case(loud=23.0, gqa=4),
    "wild tokens": Case(wild=True, gqa=4, sharp=0.1),
    "masks": Case(seen="some", gqa=2, tokens=3, shapes=[(8, 8)] * 5 + [(8, 5), (3, 8)]),
    "one slot seen": Case(seen="one", tokens=2),
    "M-RoPE": Case(sections=(16, 24, 24), halves=True, gqa=7),
    "no RoPE": Case(rotated=0, gqa=2),
    "partial RoPE, 80": Case(d_k=80, d_v=80, rotated=20, gqa=2),
    "72": Case(d_k=72, d_v=72, rotated=72, halves=True, bits="random"),
    "96": Case(d_k=96, d_v=96, rotated=96),
    "100": Case(d_k=100, d_v=100, rotated=32, halves=True, gqa=3),
    "32": Case(d_k=32, d_v=32, rotated=32),
    "64": Case(d_k=64, d_v=64, rotated=64, halves=True, gqa=3),
    "256": Case(d_k=256, d_v=256, rotated=256, halves=True, heads=1, gqa=2),
    "512": Case(d_k=512, d_v=512, rotated=512, halves=True, heads=1, gqa=2, shapes=[(8, 8)] * 3),
    "192 and 128": Case(d_k=192, d_v=128, rotated=64, heads=1, gqa=2),
    "odd": Case(d_k=33, d_v=47, rotated=0, heads=1, bits="random"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(lib, name):
    """Plain C++ within f32, kernels within what 16-bit integers and weights of 8 and 16 bits leave: docs/results/kernel.md."""
    c = CASES[name]
    _, of_sums, of_out = errors(lib, c, plain=True)
    assert of_sums < 1e-5 and of_out < 1e-5
    of_scores, of_sums, of_out = errors(lib, c, plain=False)
    assert not of_scores > 2e-3 and of_sums < 5e-3
    few = sum(h * w for h, w in c.shapes) < 200  # tokens, over which errors have no chance to cancel
    assert of_out < (3e-2 if c.wild else 1e-2 if c.bits == "random" or few else 3e-3)


def expected(c: Case, r: Result) -> np.ndarray:
    """f64 [heads, rows]: the rms error of each output if scores are off by 2.5e-3 of their deviation, and if the weights of V's rows are rounded
    to 16 bits where a block has more than 3 bits, and to 8 bits where it has less. Whole tiles with one table for all groups."""
    scores, _, out = truth(c, r.k, r.v)
    rng = np.random.default_rng(0)
    values = r.v.astype(np.float64).swapaxes(0, 1)  # [heads, slots, 64, d]

    def softmax(s: np.ndarray) -> np.ndarray:
        e = np.exp(s - s.max((1, 3), keepdims=True))
        return e / e.sum((1, 3), keepdims=True)

    off = [np.einsum("hirt,hitd->hrd", softmax(scores + 2.5e-3 * scores.std() * rng.standard_normal(scores.shape)), values) - out for _ in range(4)]
    variance = np.square(off).mean((0, 3))

    p = transform(softmax(scores)[..., None], 8, 8)[..., 0]
    coefficients = transform(values - c.v_mean[:, None, None], 8, 8)
    for bits, most in ((range(1, 4), 127), (range(4, 9), 32767)):
        parts = []
        for block, b in zip(row_blocks(64), c.v_table[0, :, 0]):
            if b in bits:
                x = coefficients[:, :, block]
                scale = np.abs(x).max((2, 3)) / 2 ** (int(b) - 1)
                parts.append((np.abs(p[..., block]).max(-1) * scale[..., None], np.square(x).sum(2).mean(-1) / np.square(scale)))
        if parts:
            unit = np.max([weight for weight, _ in parts], 0) / most  # [heads, slots, rows]
            variance += np.einsum("hir,hi->hr", np.square(unit) / 12, np.sum([codes for _, codes in parts], 0))
    return np.sqrt(variance)


@pytest.mark.parametrize(("bits", "most"), [(16 / 5, 4e-2), (5.5, 8e-3), (7, 4e-3)])
@pytest.mark.parametrize("sharp", [0.1, 1.0])
def test_wild_tokens_worst_query(lib, bits, most, sharp):
    """One token of each tile is 30 times larger, so that rows cancel for all others. Every query, not only the mean, is as good as rounding allows."""
    c = Case(wild=True, gqa=8, sharp=sharp, bits=bits, seed=5)
    r = run(lib, c, False)
    _, _, out = truth(c, r.k, r.v)
    error = np.sqrt(np.square(r.out / r.sum[..., None] - out).mean(-1))
    assert (error < 2.5 * expected(c, r)).all()
    assert (error < most * np.sqrt(np.square(out - c.v_mean[:, None]).mean(-1))).all()


@pytest.mark.parametrize("start", [(0.5, 3, 2), (50, 1e-3, -1), (-50, 1e3, 1)])
def test_the_sums_go_on_from_those_of_hot_cells(lib, start):
    for plain in (True, False):
        _, of_sums, of_out = errors(lib, CASES["32/8"], plain, start)
        assert of_sums < 1e-3 and of_out < 3e-3


def test_what_is_hidden_changes_nothing(lib):
    """Slots that a query does not see may hold anything."""
    c = Case(seen="one", gqa=2, heads=1)
    good = run(lib, c, False)
    c.v[:-1] = np.nan
    c.k[:-1] = 1e30
    bad = run(lib, c, False)
    assert (good.out == bad.out).all() and (good.sum == bad.sum).all()
